"""The scripts as people start them: the whole loop, interrupted and resumed, on real layouts."""

import json
import signal
import sys

import pytest
import torch
from helpers import (
    ROOT,
    SHORT,
    START,
    is_one_error_line,
    largest_difference,
    metrics,
    run_script,
    start_script,
    wait_for_lines,
    weights,
)
from layouts import r2gen
from safetensors.torch import load_file

import eval as evaluation
import train_grpo
import train_sft
from runtime.processes import run_main

LOGGED = (
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
)
# From the small trained model: rewards differ within groups, so that there is something to learn.
TRAINED = [f"model.path={START}", "grpo.init=base", *SHORT, "grpo.max_new_tokens=40"]
WEIGHTS = {"mccs": 0.3, "label_f1": 0.7, "soft_f1": 1.0}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One uninterrupted run of everything."""
    out = tmp_path_factory.mktemp("run")
    code, text, err = run_script("train_grpo.py", f"out={out}", *SHORT)
    assert code == 0, err
    return out, text


def adapters(run):
    return load_file(run / "last" / "adapter" / "adapter_model.safetensors")


def sample_groups(run):
    return [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]


def test_the_whole_loop_ends_with_a_table_of_both(finished):
    _, text = finished
    assert "sft" in text
    assert "ce_f1_macro13" in text
    assert "soft_f1" in text
    assert text.count("ce_f1_macro14") == 1


def test_every_step_is_logged(finished):
    out, _ = finished
    rows = metrics(out / "grpo")
    assert [r["step"] for r in rows] == [1, 2, 3]
    for name in LOGGED:
        assert isinstance(rows[0][name], float), name
    assert abs(rows[0]["kl"]) < 1e-6
    assert rows[2]["sampling/sampling_logp_difference/max"] < 1e-4


def test_grpo_trains_from_what_can_write_reports(tmp_path):
    """Rewards differ in the groups; the policy leaves the reference; the weights move."""
    code, _, err = run_script("train_grpo.py", f"out={tmp_path}", *TRAINED)
    assert code == 0, err
    run = tmp_path / "grpo"
    rows = metrics(run)
    assert all(row["grad_norm"] > 0 for row in rows)
    assert rows[0]["frac_reward_zero_std"] < 1
    assert abs(rows[0]["kl"]) < 1e-6 < rows[2]["kl/k3"]
    assert largest_difference(weights_of_start(), weights(run)) > 1e-4

    # samples.jsonl: a group of each task, its reward the weighted sum of the parts.
    groups = sample_groups(run)
    tasks = [(g["step"], g["task"]) for g in groups]
    assert tasks == [(step, task) for step in (1, 2, 3) for task in ("report", "grounding")]
    for group in groups:
        assert len(group["samples"]) == 4
        assert abs(sum(s["advantage"] for s in group["samples"])) < 1e-5
        for s in group["samples"]:
            total = sum(WEIGHTS[name] * value for name, value in s["parts"].items())
            assert s["reward"] == pytest.approx(total, abs=1e-6)


def weights_of_start():
    state = load_file(START / "model.safetensors")
    return {name: tensor.float() for name, tensor in state.items()}


def test_a_finished_run_only_evaluates_again(finished):
    out, _ = finished
    rows = metrics(out / "grpo")
    code, _, err = run_script("train_grpo.py", f"out={out}", *SHORT)
    assert code == 0, err
    assert metrics(out / "grpo") == rows


def test_a_signal_on_the_way_out_changes_nothing(finished):
    """When everything is there, a run that is asked to stop has ended well."""
    out, _ = finished
    process = start_script("train_grpo.py", f"out={out}", *SHORT)
    while "report.html" not in (line := process.stdout.readline()):
        assert line or process.poll() is None
    while process.poll() is None:
        process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0


def test_several_updates_batch_norm_and_parts(tmp_path):
    """Ratios leave 1 within a rollout, and what is sampled is still what is scored first."""
    code, _, err = run_script(
        "train_grpo.py",
        f"out={tmp_path}",
        *TRAINED,
        "grpo.epochs=2",
        "grpo.mini_batch=2",
        "grpo.adv_norm=batch",
        "grpo.normalize_parts=true",
        "grpo.importance=sequence",
        "grpo.loss_agg=constant",
        "grpo.drop_degenerate=true",
        "grpo.kl_coef=0",
        "grpo.steps=1",
        "grpo.lr=3e-3",
    )
    assert code == 0, err
    (row,) = metrics(tmp_path / "grpo")
    assert "kl" not in row
    assert row["frac_reward_zero_std"] < 1
    assert row["grad_norm"] > 0
    assert 1e-6 < abs(row["ratio"] - 1) < 1
    assert row["sampling/sampling_logp_difference/max"] < 1e-4
    assert largest_difference(weights_of_start(), weights(tmp_path / "grpo")) > 1e-4


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_interrupted_anywhere_continues_bit_for_bit(finished, tmp_path, number):
    """Stopped in SFT, late in SFT and in GRPO: the weights are those of the whole run."""
    out, _ = finished
    for stage, lines in (("sft", 1), ("sft", 3), ("grpo", 1)):
        process = start_script("train_grpo.py", f"out={tmp_path}", *SHORT)
        # The end of the configuration: from here on, signals are caught.
        while not process.stdout.readline().startswith("log:"):
            assert process.poll() is None
        wait_for_lines(tmp_path / stage / "metrics.jsonl", lines, process)
        process.send_signal(number)
        _, err = process.communicate(timeout=120)
        if number != signal.SIGKILL:
            assert process.returncode == 0, err
            assert "Traceback" not in err
        for s in ("sft", "grpo"):
            for step in (tmp_path / s).glob("step_??????"):
                assert (step / "training_state.pt").exists()
    code, _, err = run_script("train_grpo.py", f"out={tmp_path}", *SHORT)
    assert code == 0, err
    assert largest_difference(weights(out / "sft"), weights(tmp_path / "sft")) == 0
    assert largest_difference(weights(out / "grpo"), weights(tmp_path / "grpo")) == 0
    rewards = [row["reward"] for row in metrics(out / "grpo")]
    assert [row["reward"] for row in metrics(tmp_path / "grpo")] == rewards


def test_every_process_gives_its_samples(tmp_path):
    """samples.jsonl has a group of each task of the step, the same with one and two processes."""
    groups = []
    for name, processes in (("one", 0), ("two", 2)):
        out = tmp_path / name
        code, _, err = run_script(
            "train_grpo.py", f"out={out}", *TRAINED, "grpo.steps=2", processes=processes
        )
        assert code == 0, err
        groups.append([(g["step"], g["task"], g["id"]) for g in sample_groups(out / "grpo")])
    assert [task for _, task, _ in groups[0]] == ["report", "grounding"] * 2
    assert groups[0] == groups[1]


def test_thinking_from_cold_start(tmp_path):
    code, _, err = run_script(
        "train_grpo.py",
        f"out={tmp_path}",
        *SHORT,
        "data.thinking=true",
        "rewards.report={mccs: 0.75, format: 0.25}",
        "grpo.steps=1",
    )
    assert code == 0, err
    assert (tmp_path / "cold_start" / "best").exists()
    assert "rewards/format/mean" in metrics(tmp_path / "grpo")[0]


def test_adapters_continue_bit_for_bit(tmp_path):
    lora = [*TRAINED, "grpo.lora_rank=4", "grpo.lr=1e-2", "eval.limit=2"]
    for name, steps in (("whole", 3), ("parts", 2), ("parts", 3)):
        code, _, err = run_script(
            "train_grpo.py", f"out={tmp_path / name}", *lora, f"grpo.steps={steps}"
        )
        assert code == 0, err
    whole, parts = (tmp_path / name / "grpo" for name in ("whole", "parts"))
    assert largest_difference(weights(whole), weights(parts)) == 0
    assert largest_difference(adapters(whole), adapters(parts)) == 0

    # The reference is the start, and nothing moves but what has adapters.
    rows = metrics(whole)
    assert abs(rows[0]["kl"]) < 1e-6 < rows[2]["kl/k3"]
    before, after = weights_of_start(), weights(whole)
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    assert moved
    assert all(name.endswith("_proj.weight") for name in moved)


def test_more_of_the_same(finished, tmp_path):
    out, _ = finished
    start = f"sft.init={out}/sft/best"
    code, _, err = run_script("train_sft.py", f"out={tmp_path}", start, *SHORT, "sft.stage=more")
    assert code == 0, err
    assert (tmp_path / "more" / "best").exists()
    code, text, err = run_script(
        "eval.py",
        f"out={tmp_path}",
        *SHORT,
        "--checkpoint",
        str(out / "sft"),
        str(tmp_path / "more"),
    )
    assert code == 0, err
    assert "more" in text


def test_iu_xray(tmp_path):
    args = [f"data.path={r2gen(tmp_path / 'iu')}", f"out={tmp_path / 'out'}", *SHORT]
    code, _, err = run_script("train_sft.py", *args, config="configs/iu_xray.yaml")
    assert code == 0, err
    code, text, err = run_script("train_grpo.py", *args, config="configs/iu_xray.yaml", processes=1)
    assert code == 0, err
    assert "ce_f1_macro13" in text


# ------------------------------------------------------------------------------- errors


def test_a_user_error_is_one_line_and_exit_status_1(tmp_path):
    code, _, err = run_script("train_grpo.py", f"out={tmp_path}", *SHORT, "grpo.kl_coeff=1")
    assert code == 1
    assert is_one_error_line(err, "grpo.kl_coef"), err


def test_a_reward_that_fails_while_training_is_one_line(tmp_path):
    code = "import json\ndef parsed(completions, **columns):\n"
    code += "    return [json.loads(text) for text in completions]\n"
    (tmp_path / "own.py").write_text(code)
    report = f"rewards.report={{{tmp_path}/own.py:parsed: 1}}"
    code, _, err = run_script("train_grpo.py", f"out={tmp_path}", *SHORT, "grpo.init=base", report)
    assert code == 1
    last = err.strip().splitlines()[-1]
    assert last.startswith("error: reward ")
    assert "own.py:parsed, line 3: JSONDecodeError" in last
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("script", "override", "message"),
    [
        (train_sft, "data.source=iu_xray", "data.path"),
        (train_grpo, "rewards.report.mcs=1", "'mccs'"),
        (train_grpo, "grpo.init=/absent", "/absent"),
        (train_grpo, "rewards.chexbert=/absent.pth", "rewards.chexbert"),
        (evaluation, "--checkpoint=/absent", "/absent"),
        (train_grpo, "grpo.normalize_parts=true", "grpo.adv_norm=group or batch"),
        (train_sft, "sft.stage=cold_start", "data.thinking"),
        (train_sft, "model.path=/absent/model", "/absent/model"),
    ],
)
def test_user_errors_are_one_line(tmp_path, monkeypatch, capsys, script, override, message):
    args = [str(ROOT / "config.yaml"), f"out={tmp_path}", *SHORT, override]
    monkeypatch.setattr(sys, "argv", [script.__name__, *args])
    # The scripts catch signals for themselves.
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit) as end:
        run_main(script.main)
    assert end.value.code == 1
    assert is_one_error_line(capsys.readouterr().err, message)


def test_a_bad_image_stops_or_is_skipped(tmp_path):
    root = r2gen(tmp_path / "iu")
    path = root / "images" / "CXR0" / "0.png"
    path.write_bytes(path.read_bytes()[:60])
    args = [f"data.path={root}", f"out={tmp_path / 'out'}", *SHORT, "sft.steps=1"]
    iu = {"config": "configs/iu_xray.yaml"}
    code, _, err = run_script("train_sft.py", *args, "data.on_error=stop", **iu)
    assert code == 1
    assert "CXR0/0.png" in err
    assert "Traceback" not in err
    code, _, err = run_script("train_sft.py", *args, "data.on_error=skip", **iu)
    assert code == 0
    assert "CXR0/0.png" in err
    assert "skipped" in err
