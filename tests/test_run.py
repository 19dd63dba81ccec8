"""The scripts as people start them: the whole loop, interrupted and resumed, on two processes, with thinking, on real layouts."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

import data
import eval as evaluation
import rewards
import train_grpo
import train_sft
from conftest import ROOT
from layouts import r2gen

SHORT = [
    "data.train_size=24",
    "data.val_size=4",
    "data.test_size=6",
    "model.max_pixels=9216",
    "sft.steps=4",
    "sft.more_steps=2",
    "sft.batch_size=4",
    "sft.eval_every=2",
    "sft.save_every=2",
    "grpo.steps=3",
    "grpo.prompts=4",
    "grpo.group_size=4",
    "grpo.max_new_tokens=12",
    "grpo.save_every=1",
    "grpo.lr=1e-3",
    "eval.bootstrap=20",
]


def start(script, *args, processes=0, config="config.yaml"):
    launcher = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        if processes
        else []
    )
    command = [sys.executable, *launcher, str(ROOT / script), str(ROOT / config), *args]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def run(script, *args, **options):
    process = start(script, *args, **options)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def weights(folder):
    return load_file(folder / "last" / "model.safetensors")


def difference(a, b):
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One uninterrupted run of everything."""
    out = tmp_path_factory.mktemp("run")
    code, text, err = run("train_grpo.py", f"out={out}", *SHORT)
    assert code == 0, err
    return out, text


def test_the_whole_loop(finished):
    out, text = finished
    assert (
        "sft" in text
        and "ce_f1_macro13" in text
        and "soft_f1" in text
        and text.count("ce_f1_macro14") == 1
    )
    rows = metrics(out / "grpo")
    assert [r["step"] for r in rows] == [1, 2, 3]
    for name in (
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
    ):
        assert isinstance(rows[0][name], float), name
    assert abs(rows[0]["kl"]) < 1e-6 < rows[2]["kl/k3"]  # starts at the reference, then moves
    assert rows[2]["sampling/sampling_logp_difference/max"] < 1e-4
    groups = [
        json.loads(line) for line in (out / "grpo" / "samples.jsonl").read_text().splitlines()
    ]
    assert [(g["step"], g["task"]) for g in groups] == [
        (step, task) for step in (1, 2, 3) for task in ("report", "grounding")
    ]
    for g, parts in zip(groups, [{"mccs": 0.3, "label_f1": 0.7}, {"soft_f1": 1.0}] * 3):
        assert len(g["samples"]) == 4 and abs(sum(s["advantage"] for s in g["samples"])) < 1e-5
        assert all(
            abs(s["reward"] - sum(parts[name] * value for name, value in s["parts"].items())) < 1e-6
            for s in g["samples"]
        )
    assert difference(weights(out / "sft"), weights(out / "grpo")) > 1e-4
    again = run("train_grpo.py", f"out={out}", *SHORT)  # nothing left to do but evaluate
    assert again[0] == 0 and metrics(out / "grpo") == rows


def test_a_signal_on_the_way_out_changes_nothing(finished):
    """Asked once more when everything is there: told off in the middle of its end, a run has still ended well."""
    out, _ = finished
    process = start("train_grpo.py", f"out={out}", *SHORT)
    while "report.html" not in (line := process.stdout.readline()):
        assert line or process.poll() is None
    for _ in range(200):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.005)
    assert process.wait(60) == 0


def test_several_updates_batch_norm_and_parts(finished, tmp_path):
    out, _ = finished
    code, _, err = run(
        "train_grpo.py",
        f"out={tmp_path}",
        f"grpo.init={out}/sft/best",
        *SHORT,
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
    assert code == 0, err
    (row,) = metrics(tmp_path / "grpo")
    assert "kl" not in row and abs(row["ratio"] - 1) > 1e-6


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_interrupted_anywhere_continues_bit_for_bit(finished, tmp_path, number):
    """Stopped three times at different moments: the final weights are those of the run that was never stopped."""
    out, _ = finished
    for seconds_after_start in (2, 3, 5):
        process = start("train_grpo.py", f"out={tmp_path}", *SHORT)
        while not process.stdout.readline().startswith(
            "log:"
        ):  # the configuration: signals are handled from here
            assert process.poll() is None
        time.sleep(seconds_after_start)
        process.send_signal(number)
        text, err = process.communicate(timeout=120)
        if number != signal.SIGKILL:
            assert process.returncode == 0 and "Traceback" not in err, err
        assert all(
            (p / "training_state.pt").exists()
            for s in ("sft", "grpo")
            for p in (tmp_path / s).glob("step_??????")
        )
    code, _, err = run("train_grpo.py", f"out={tmp_path}", *SHORT)
    assert code == 0, err
    assert difference(weights(out / "grpo"), weights(tmp_path / "grpo")) == 0
    assert [r["step"] for r in metrics(tmp_path / "grpo")] == [1, 2, 3]
    assert [r["reward"] for r in metrics(tmp_path / "grpo")] == [
        r["reward"] for r in metrics(out / "grpo")
    ]


def test_two_processes_equal_one(tmp_path):
    """The same samples, losses and weights, whatever the number of processes (up to rounding, which Muon's iterations in
    bfloat16 would magnify), replicated or sharded."""
    for name, processes in (("one", 1), ("replicate", 2), ("shard", 2)):
        code, text, err = run(
            "train_grpo.py",
            f"out={tmp_path / name}",
            *SHORT,
            "sft.optimizer=adamw",
            f"model.parallel={name.replace('one', 'shard')}",
            processes=processes,
        )
        assert code == 0, err
        assert "ce_f1_macro13" in text
        for a, b in zip(
            metrics(tmp_path / "one" / "grpo"), metrics(tmp_path / name / "grpo"), strict=True
        ):
            for key in (
                "reward",
                "loss",
                "grad_norm",
                "entropy",
                "completions/mean_length",
                "kl/k3",
            ):
                assert a[key] == pytest.approx(b[key], rel=1e-3, abs=1e-5), key
        assert (
            difference(weights(tmp_path / "one" / "sft"), weights(tmp_path / name / "sft")) < 1e-4
        )


def test_thinking_from_cold_start(tmp_path):
    code, text, err = run(
        "train_grpo.py",
        f"out={tmp_path}",
        *SHORT,
        "data.thinking=true",
        "rewards.report={mccs: 0.75, format: 0.25}",
        "grpo.steps=1",
    )
    assert code == 0, err
    assert (tmp_path / "cold_start" / "best").exists() and "rewards/format/mean" in metrics(
        tmp_path / "grpo"
    )[0]


def test_adapters_continue_bit_for_bit(finished, tmp_path):
    out, _ = finished
    lora = [f"grpo.init={out}/sft/best", "grpo.lora_rank=4", "grpo.lr=1e-2", "eval.limit=2"]
    for name, steps in (("whole", 3), ("parts", 2), ("parts", 3)):
        code, text, err = run(
            "train_grpo.py", f"out={tmp_path / name}", *SHORT, *lora, f"grpo.steps={steps}"
        )
        assert code == 0, err
    whole, parts = (tmp_path / name / "grpo" for name in ("whole", "parts"))
    assert difference(weights(whole), weights(parts)) == 0
    assert (
        difference(
            *(
                load_file(f / "last" / "adapter" / "adapter_model.safetensors")
                for f in (whole, parts)
            )
        )
        == 0
    )
    rows = metrics(whole)
    assert abs(rows[0]["kl"]) < 1e-6 < rows[2]["kl/k3"]  # the reference is the start
    moved = {n for n, w in weights(whole).items() if not torch.equal(w, weights(out / "sft")[n])}
    assert moved and all(n.endswith("_proj.weight") for n in moved)  # nothing but what has adapters


def test_more_of_the_same(finished, tmp_path):
    out, _ = finished
    code, _, err = run(
        "train_sft.py", f"out={tmp_path}", f"sft.init={out}/sft/best", *SHORT, "sft.stage=more"
    )
    assert code == 0 and (tmp_path / "more" / "best").exists(), err
    code, text, err = run(
        "eval.py",
        f"out={tmp_path}",
        *SHORT,
        "--checkpoint",
        str(out / "sft"),
        str(tmp_path / "more"),
    )
    assert code == 0 and "more" in text, err


def test_iu_xray(tmp_path):
    args = [
        f"data.path={r2gen(tmp_path / 'iu')}",
        f"out={tmp_path / 'out'}",
        *SHORT,
        "model.max_pixels=9216",
    ]
    code, _, err = run("train_sft.py", *args, config="configs/iu_xray.yaml")
    assert code == 0, err
    code, text, err = run("train_grpo.py", *args, config="configs/iu_xray.yaml", processes=1)
    assert code == 0 and "ce_f1_macro13" in text, err


def one_line(err, message):
    lines = [line for line in err.splitlines() if line.strip()]
    return len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0]


def test_a_user_error_is_one_line_and_exit_status_1(tmp_path):
    code, _, err = run("train_grpo.py", f"out={tmp_path}", *SHORT, "grpo.kl_coeff=1")
    assert code == 1 and one_line(err, "grpo.kl_coef"), err


def test_a_reward_that_fails_while_training_is_one_line(tmp_path):
    (tmp_path / "own.py").write_text(
        "import json\ndef parsed(completions, **columns):\n    return [json.loads(text) for text in completions]\n"
    )
    code, _, err = run(
        "train_grpo.py",
        f"out={tmp_path}",
        *SHORT,
        "grpo.init=base",
        f"rewards.report={{{tmp_path}/own.py:parsed: 1}}",
    )
    last = err.strip().splitlines()[-1]
    assert (
        code == 1
        and last.startswith("error: reward ")
        and "own.py:parsed, line 3: JSONDecodeError" in last
        and "Traceback" not in err
    ), err


@pytest.mark.parametrize(
    "script, override, message",
    [
        (train_sft, "data.source=iu_xray", "data.path"),
        (train_grpo, "rewards.report.mcs=1", "'mccs'"),
        (train_grpo, "grpo.init=/absent", "/absent"),
        (train_grpo, "rewards.labeler=chexbert", "rewards.chexbert"),
        (evaluation, "--checkpoint=/absent", "/absent"),
        (train_grpo, "grpo.normalize_parts=true", "grpo.adv_norm=group or batch"),
        (train_sft, "sft.stage=cold_start", "data.thinking"),
        (train_sft, "model.path=/absent/model", "/absent/model"),
    ],
)
def test_user_errors_are_one_line(tmp_path, monkeypatch, capsys, script, override, message):
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    monkeypatch.setattr(
        sys,
        "argv",
        [script.__name__, str(ROOT / "config.yaml"), f"out={tmp_path}", *SHORT, override],
    )
    with pytest.raises(SystemExit) as end:
        data.run_main(script.main, rewards.RewardError)
    for number, handler in zip((signal.SIGINT, signal.SIGTERM), handlers):
        signal.signal(number, handler)
    assert end.value.code == 1 and one_line(capsys.readouterr().err, message)


def test_a_bad_image_stops_or_is_skipped(tmp_path):
    root = r2gen(tmp_path / "iu")
    path = root / "images" / "CXR0" / "0.png"
    path.write_bytes(path.read_bytes()[:60])
    args = [f"data.path={root}", f"out={tmp_path / 'out'}", *SHORT, "sft.steps=1"]
    code, _, err = run("train_sft.py", *args, "data.on_error=stop", config="configs/iu_xray.yaml")
    assert code == 1 and "CXR0/0.png" in err and "Traceback" not in err
    code, _, err = run("train_sft.py", *args, "data.on_error=skip", config="configs/iu_xray.yaml")
    assert code == 0 and "CXR0/0.png" in err and "skipped" in err
