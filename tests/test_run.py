"""The scripts as people start them: the whole loop, interrupted and resumed, on two processes, with
thinking, on a dataset as it is distributed.

What a GRPO step computes, in every way to run it, is compared in tests/test_trajectories.py.
"""

import json
import signal
import sys

import pytest
import torch
from helpers import (
    LEARNING,
    ROOT,
    SHORT,
    START,
    is_one_error_line,
    largest_difference,
    load,
    metrics,
    run_script,
    start_script,
    tolerance,
    wait_for_lines,
    weights,
)
from layouts import r2gen
from safetensors.torch import load_file

import eval as evaluation
import train_grpo
import train_sft
from runtime.checkpoint import last_step
from runtime.log import Log
from runtime.processes import SIGNALS, run_main

GROUPS = [(step, task) for step in (1, 2, 3) for task in ("report", "grounding")]


def run(script, *args, **options):
    """Run a script that has to succeed: its output."""
    code, out, err = run_script(script, *args, **options)
    assert code == 0, err
    return out


def samples(run):
    """The lines of samples.jsonl of a run folder."""
    return [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]


def texts_of(group):
    return [sample["text"] for sample in group["samples"]]


def learns(row):
    """A step of GRPO whose rewards differ, and whose gradient is not zero."""
    return row["reward_std"] > 1e-3 and row["grad_norm"] > 1e-3


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder and the output of one uninterrupted run of everything."""
    out = tmp_path_factory.mktemp("run")
    return out, run("train_grpo.py", f"out={out}", *LEARNING)


# ------------------------------------------------------------------------------- the whole loop


def test_the_whole_loop(finished):
    out, text = finished
    rows = metrics(out / "grpo")
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert all(map(learns, rows))
    # It starts at the reference, then moves.
    assert abs(rows[0]["kl"]) < 1e-6
    assert rows[2]["kl/k3"] > 1e-3
    assert largest_difference(weights(out / "sft"), weights(out / "grpo")) > 1e-4
    assert "sft" in text
    assert "ce_f1_macro13" in text
    assert "soft_f1" in text
    assert text.count("ce_f1_macro14") == 1


@pytest.mark.parametrize(
    "name",
    [
        "reward",
        "reward_std",
        "frac_reward_zero_std",
        "rewards/mccs/mean",
        "rewards/label_f1/mean",
        "rewards/soft_f1/mean",
        "kl",
        "kl/k1",
        "kl/k2",
        "kl/k3",
        "clip_ratio/region_mean",
        "entropy",
        "completions/mean_length",
        "completions/clipped_ratio",
        "grad_norm",
        "sampling/sampling_logp_difference/mean",
        "tokens_per_second",
        "time/sample",
        "time/update",
        "learning_rate",
    ],
)
def test_what_is_logged(finished, name):
    out, _ = finished
    assert isinstance(metrics(out / "grpo")[0][name], float)


def test_samples_of_both_tasks_are_written_at_every_step(finished):
    out, _ = finished
    groups = samples(out / "grpo")
    assert [(group["step"], group["task"]) for group in groups] == GROUPS
    weights_of = {"report": {"mccs": 0.3, "label_f1": 0.7}, "grounding": {"soft_f1": 1.0}}
    for group in groups:
        table = weights_of[group["task"]]
        assert len(group["samples"]) == 4
        assert sum(s["advantage"] for s in group["samples"]) == pytest.approx(0, abs=1e-5)
        for sample in group["samples"]:
            reward = sum(table[name] * value for name, value in sample["parts"].items())
            assert sample["reward"] == pytest.approx(reward, abs=1e-6)


def test_a_signal_on_the_way_out_changes_nothing(finished):
    """A finished run only evaluates again. Told to stop as it ends, it has still ended well."""
    out, _ = finished
    before = metrics(out / "grpo")
    process = start_script("train_grpo.py", f"out={out}", *LEARNING)
    while "report.html" not in (line := process.stdout.readline()):
        assert line or process.poll() is None
    while process.poll() is None:
        process.send_signal(signal.SIGTERM)
    process.communicate()
    assert process.returncode == 0
    assert metrics(out / "grpo") == before


# ------------------------------------------------------------------------------- settings


def test_several_updates_batch_norm_and_parts(tmp_path, device):
    run(
        "train_grpo.py",
        f"out={tmp_path}",
        *LEARNING,
        "grpo.init=base",
        "grpo.epochs=2",
        "grpo.mini_batch=2",
        "grpo.adv_norm=batch",
        "grpo.normalize_parts=true",
        "grpo.importance=sequence",
        "grpo.loss_agg=constant",
        "grpo.drop_degenerate=true",
        "grpo.kl_coef=0",
        "grpo.steps=1",
    )
    (row,) = metrics(tmp_path / "grpo")
    assert learns(row)
    assert "kl" not in row
    # The second updates are taken for weights that have moved.
    assert row["ratio"] == pytest.approx(1, abs=0.2)
    assert abs(row["ratio"] - 1) > 1e-6
    assert row["sampling/sampling_logp_difference/max"] < tolerance("library", device)
    start = load_file(START / "model.safetensors")
    assert largest_difference(weights(tmp_path / "grpo"), start) > 1e-4


def test_thinking_from_cold_start(tmp_path):
    run(
        "train_grpo.py",
        f"out={tmp_path}",
        *LEARNING,
        "data.thinking=true",
        "rewards.report={mccs: 0.75, format: 0.25}",
        "grpo.max_new_tokens=96",
        "grpo.steps=1",
    )
    assert (tmp_path / "cold_start" / "best").exists()
    (row,) = metrics(tmp_path / "grpo")
    assert learns(row)
    assert "rewards/format/mean" in row


def test_more_of_the_same(finished, tmp_path):
    out, _ = finished
    init = f"sft.init={out}/sft/best"
    run("train_sft.py", f"out={tmp_path}", *LEARNING, init, "sft.stage=more")
    assert [row["step"] for row in metrics(tmp_path / "more")] == [1, 2]
    more = tmp_path / "more"
    assert largest_difference(weights(out / "sft"), weights(more)) > 1e-6
    text = run("eval.py", f"out={tmp_path}", *SHORT, "--checkpoint", str(out / "sft"), str(more))
    assert "more" in text


def test_iu_xray(tmp_path):
    args = [f"data.path={r2gen(tmp_path / 'iu')}", f"out={tmp_path / 'out'}", *LEARNING]
    # Its reports are too short for labels.
    args.append("rewards.report={gleu: 1}")
    run("train_sft.py", *args, config="configs/iu_xray.yaml")
    text = run("train_grpo.py", *args, config="configs/iu_xray.yaml", processes=1)
    assert all(map(learns, metrics(tmp_path / "out" / "grpo")))
    assert "ce_f1_macro13" in text


# ------------------------------------------------------------------------------- interruptions

# A line in one of these files says that the stage is under way.
STAGES = ["sft/metrics.jsonl", "grpo/metrics.jsonl", "eval/sft.jsonl"]


def end(process, number):
    """Send a signal, and wait for the end: (exit status, stderr)."""
    process.send_signal(number)
    _, err = process.communicate(timeout=120)
    return process.returncode, err


@pytest.mark.parametrize(
    ("numbers", "status"),
    [([signal.SIGTERM, signal.SIGINT, signal.SIGTERM], 0), ([signal.SIGKILL] * 3, -signal.SIGKILL)],
    ids=["asked to stop", "killed"],
)
def test_interrupted_anywhere_continues_bit_for_bit(finished, tmp_path, device, numbers, status):
    """Stopped while it trains with SFT, with GRPO, and while it evaluates: the weights are those
    of the run that was never stopped."""
    out, _ = finished
    reached = []
    for stage, number in zip(STAGES, numbers):
        process = start_script("train_grpo.py", f"out={tmp_path}", *LEARNING)
        wait_for_lines(tmp_path / stage, 1, process)
        code, err = end(process, number)
        assert code == status, err
        assert "Traceback" not in err
        for step in tmp_path.glob("*/step_??????"):
            assert (step / "training_state.pt").exists()
        reached.append([last_step(tmp_path / name) for name in ("sft", "grpo")])
    # It was in the middle of these stages.
    assert reached[0][0] < 4
    assert reached[1][1] < 3
    assert reached[2] == [4, 3]

    run("train_grpo.py", f"out={tmp_path}", *LEARNING)
    for name in ("sft", "grpo"):
        rows, wanted = metrics(tmp_path / name), metrics(out / name)
        assert [row["step"] for row in rows] == [row["step"] for row in wanted]
        limit = tolerance("training", device)
        assert largest_difference(weights(out / name), weights(tmp_path / name)) <= limit
        for row, other in zip(rows, wanted):
            assert row["loss"] == pytest.approx(other["loss"], abs=limit)
    expected = [row["reward"] for row in metrics(out / "grpo")]
    got = [row["reward"] for row in metrics(tmp_path / "grpo")]
    assert got == pytest.approx(expected, abs=tolerance("training", device))


def test_adapters_continue_bit_for_bit(finished, tmp_path, device):
    out, _ = finished
    lora = [f"grpo.init={out}/sft/best", "grpo.lora_rank=4", "grpo.lr=1e-2", "eval.limit=2"]
    for name, steps in (("whole", 3), ("parts", 2), ("parts", 3)):
        folder = f"out={tmp_path / name}"
        run("train_grpo.py", folder, *LEARNING, *lora, f"grpo.steps={steps}")
    whole, parts = tmp_path / "whole" / "grpo", tmp_path / "parts" / "grpo"
    limit = tolerance("training", device)
    assert largest_difference(weights(whole), weights(parts)) <= limit
    adapters = [
        load_file(folder / "last" / "adapter" / "adapter_model.safetensors")
        for folder in (whole, parts)
    ]
    assert largest_difference(*adapters) <= limit

    rows = metrics(whole)
    assert all(map(learns, rows))
    # The reference is the start.
    assert abs(rows[0]["kl"]) < 1e-6
    assert rows[2]["kl/k3"] > 1e-6
    # Nothing moves but what has adapters.
    before = load_file(out / "sft" / "best" / "model.safetensors")
    moved = {name for name, w in weights(whole).items() if not torch.equal(w, before[name])}
    assert moved
    assert all(name.endswith("_proj.weight") for name in moved)


@pytest.mark.parametrize("parallel", ["replicate", "shard"])
def test_two_processes_equal_one(finished, several_processes, tmp_path, device, parallel):
    """The same supervised training and samples, and an evaluation."""
    out, _ = finished
    limit = tolerance("library", device)
    way = f"model.parallel={parallel}"
    text = run("train_grpo.py", f"out={tmp_path}", *LEARNING, way, processes=2)
    assert "ce_f1_macro13" in text
    assert largest_difference(weights(out / "sft"), weights(tmp_path / "sft")) < limit
    for a, b in zip(metrics(out / "sft"), metrics(tmp_path / "sft"), strict=True):
        for name in ("loss", "grad_norm", "num_tokens"):
            assert a[name] == pytest.approx(b[name], rel=1e-3), name
    # Later steps sample from weights that rounding has moved.
    first, other = metrics(out / "grpo")[0], metrics(tmp_path / "grpo")[0]
    assert first["reward"] == pytest.approx(other["reward"], rel=1e-3)

    # A group of every task, and the same ones.
    expected, got = samples(out / "grpo"), samples(tmp_path / "grpo")
    assert [(group["step"], group["task"]) for group in got] == GROUPS
    assert [group["id"] for group in got] == [group["id"] for group in expected]
    assert texts_of(got[0]) == texts_of(expected[0])


# ------------------------------------------------------------------------------- errors


def test_a_user_error_is_one_line_and_exit_status_1(tmp_path):
    code, _, err = run_script("train_grpo.py", f"out={tmp_path}", *SHORT, "grpo.kl_coeff=1")
    assert code == 1
    assert is_one_error_line(err, "grpo.kl_coef")


def test_a_reward_that_fails_while_training_is_one_line(tmp_path):
    path = tmp_path / "own.py"
    path.write_text(
        "import json\n"
        "def parsed(completions, **columns):\n"
        "    return [json.loads(text) for text in completions]\n"
    )
    table = f"rewards.report={{{path}:parsed: 1}}"
    code, _, err = run_script("train_grpo.py", f"out={tmp_path}", *SHORT, "grpo.init=base", table)
    assert code == 1
    assert "Traceback" not in err
    last = err.strip().splitlines()[-1]
    assert last.startswith("error: reward ")
    assert "own.py:parsed, line 3: JSONDecodeError" in last


@pytest.fixture
def handlers():
    """Puts the handlers of signals back."""
    before = [signal.getsignal(number) for number in SIGNALS]
    yield
    for number, handler in zip(SIGNALS, before):
        signal.signal(number, handler)


@pytest.mark.parametrize(
    ("script", "override", "message"),
    [
        (train_sft, "data.source=iu_xray", "data.path"),
        (train_sft, "sft.stage=cold_start", "data.thinking"),
        (train_sft, "model.path=/absent/model", "/absent/model"),
        (train_grpo, "rewards.report.mcs=1", "'mccs'"),
        (train_grpo, "grpo.init=/absent", "/absent"),
        (train_grpo, "rewards.chexbert=/absent.pth", "rewards.chexbert"),
        (train_grpo, "grpo.normalize_parts=true", "grpo.adv_norm=group or batch"),
        (evaluation, "--checkpoint=/absent", "/absent"),
    ],
)
def test_user_errors_are_one_line(
    tmp_path, monkeypatch, capsys, handlers, script, override, message
):
    config = str(ROOT / "config.yaml")
    monkeypatch.setattr(sys, "argv", [script.__name__, config, f"out={tmp_path}", *SHORT, override])
    with pytest.raises(SystemExit) as ended:
        run_main(script.main)
    assert ended.value.code == 1
    assert is_one_error_line(capsys.readouterr().err, message)


@pytest.mark.parametrize(("on_error", "status"), [("stop", 1), ("skip", 0)])
def test_a_bad_image_stops_or_is_skipped(tmp_path, on_error, status):
    root = r2gen(tmp_path / "iu")
    path = root / "images" / "CXR0" / "0.png"
    path.write_bytes(path.read_bytes()[:60])
    code, _, err = run_script(
        "train_sft.py",
        f"data.path={root}",
        f"out={tmp_path / 'out'}",
        *SHORT,
        "sft.steps=1",
        f"data.on_error={on_error}",
        config="configs/iu_xray.yaml",
    )
    assert code == status
    assert "CXR0/0.png" in err
    assert "Traceback" not in err
    assert ("skipped" in err) == (on_error == "skip")


# ------------------------------------------------------------------------------- Weights & Biases


class Wandb:
    """What the package is asked for."""

    def __init__(self):
        self.runs = []
        self.rows = []
        self.active = False

    def init(self, **options):
        # As wandb does: else the active record goes on.
        if not self.active:
            self.runs.append(options)
        self.active = True
        return self

    def finish(self):
        self.active = False

    def log(self, row, step):
        self.rows.append(step)


@pytest.fixture
def wandb(monkeypatch):
    fake = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def logged(run, first):
    log = Log(run, load("log.wandb=true"), first, first + 1)
    for step in log.steps():
        log.metrics(step + 1, {"num_tokens": 1})


def test_a_resumed_run_goes_on_in_the_same_record(wandb, tmp_path):
    logged(tmp_path, 0)
    logged(tmp_path, 1)
    first, second = wandb.runs
    assert first["id"] == second["id"]
    assert second["resume"] == "allow"
    assert wandb.rows == [1, 2]


def test_another_run_has_another_record(wandb, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        logged(tmp_path / name, 0)
    first, second = wandb.runs
    assert first["id"] != second["id"]
