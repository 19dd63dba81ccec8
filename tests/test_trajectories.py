"""The safety net: short runs through the command line give what they gave before, in every way.

  python tests/test_trajectories.py record [SETTING ...]     makes trajectories.json, or parts of it
  python tests/test_trajectories.py compare [SETTING ...]    prints the largest differences to it

trajectories.json holds, for each setting, the sampled tokens, what every step logged, and how far
the weights moved. All runs begin at tests/start, a small model that has learnt to write reports and
boxes, so that rewards differ within groups.
"""

import json
import shutil
import signal
import sys
import tempfile
from itertools import chain
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parents[1]))

from helpers import START, metrics, start_script, tolerance, wait_for_lines, weights

STORED = Path(__file__).with_name("trajectories.json")

SMALLEST = 1e-2  # smaller values are compared as if they were of this size: losses cancel

COMMON = [
    f"model.path={START}",
    "model.max_pixels=9216",
    "data.train_size=24",
    "data.val_size=4",
    "data.test_size=2",
    "eval.limit=1",
]
GRPO = [
    "grpo.init=base",
    "grpo.steps=4",
    "grpo.prompts=6",
    "grpo.group_size=4",
    "grpo.max_new_tokens=40",
    "grpo.micro_tokens=700",
    "grpo.temperature=1",
    "grpo.lr=1e-3",
    "grpo.save_every=1",
]
SFT = [
    "sft.steps=4",
    "sft.batch_size=6",
    "sft.optimizer=adamw",
    "sft.lr=1e-3",
    "sft.warmup=2",
    "sft.eval_every=2",
]
SETTINGS = {
    "default": ["train_grpo.py", *GRPO],
    "thinking": [
        "train_grpo.py",
        *GRPO,
        "data.thinking=true",
        "grpo.max_new_tokens=96",
        "rewards.report={mccs: 0.75, format: 0.25}",
        "rewards.grounding={soft_f1: 0.75, format: 0.25}",
        "grpo.lr=1e-4",
        "grpo.steps=3",
    ],
    "LoRA": ["train_grpo.py", *GRPO, "grpo.lora_rank=4", "grpo.lr=1e-2", "grpo.adv_norm=group"],
    "several updates": [
        "train_grpo.py",
        *GRPO,
        "grpo.freeze=[]",
        "grpo.mini_batch=3",
        "grpo.epochs=2",
        "grpo.lr=3e-4",
        "grpo.loss_agg=sequence",
        "grpo.steps=3",
    ],
    "GSPO": [
        "train_grpo.py",
        *GRPO,
        "grpo.importance=sequence",
        "grpo.epochs=2",
        "grpo.kl_estimator=k2",
        "grpo.kl_coef=0.1",
        "grpo.clip_low=0.01",
        "grpo.clip_high=0.01",
        "grpo.steps=3",
    ],
    "batch std and parts": [
        "train_grpo.py",
        *GRPO,
        "grpo.adv_norm=batch",
        "grpo.normalize_parts=true",
        "grpo.drop_degenerate=true",
        "grpo.loss_agg=constant",
        "rewards.report={mccs: 0.3, label_f1: 0.3, gleu: 0.3, overlong: 0.1}",
        "rewards.overlong_start=8",
        "rewards.overlong_end=40",
        "grpo.steps=3",
    ],
    "SFT": ["train_sft.py", *SFT, "sft.init=base"],
}
# Different ways to the same numbers: setting, name of the way, what it sets, and the number of
# processes (0: without torchrun).
WAYS = [
    ("default", "as it is", [], 0),
    ("default", "compiled", ["model.compile=true"], 0),
    (
        "default",
        "two processes, sharded, compiled",
        ["model.parallel=shard", "model.compile=true"],
        2,
    ),
    ("default", "micro-batches of 1", ["grpo.micro_tokens=1", "grpo.sample_batch=2"], 0),
    ("default", "plain rows", ["model.shared_prefix=false"], 0),
    ("default", "killed and resumed", [], 0),
    ("default", "two processes, replicated", ["model.parallel=replicate"], 2),
    ("default", "two processes, sharded", ["model.parallel=shard"], 2),
    ("thinking", "as it is", [], 0),
    ("LoRA", "as it is", [], 0),
    ("several updates", "as it is", [], 0),
    ("several updates", "two processes, sharded", ["model.parallel=shard"], 2),
    ("GSPO", "as it is", [], 0),
    ("batch std and parts", "as it is", [], 0),
    ("batch std and parts", "two processes, replicated", [], 2),
    ("SFT", "as it is", [], 0),
    ("SFT", "micro-batches of 1", ["sft.micro_batch=1", "model.gradient_checkpointing=true"], 0),
]
LOGGED = {
    "train_grpo.py": ["loss", "grad_norm", "reward", "kl", "entropy", "completions/mean_length"],
    "train_sft.py": ["loss", "grad_norm", "eval_loss"],
}


def start(setting, out, args, processes, earlier):
    script, *settings = SETTINGS[setting]
    overrides = [*COMMON, *settings, *args, f"out={out}"]
    return start_script("tests/replay.py", str(earlier), script, *overrides, processes=processes)


def stage_of(setting):
    return "sft" if SETTINGS[setting][0] == "train_sft.py" else "grpo"


def run(setting, out, args=(), processes=0, earlier=(), interrupt=False):
    """Run a setting in the folder `out`, and read what it left there."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / "earlier.json"
    path.write_text(json.dumps(list(earlier)))
    if interrupt:
        process = start(setting, out, args, processes, path)
        wait_for_lines(out / stage_of(setting) / "metrics.jsonl", 2, process)
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
        assert process.returncode == -signal.SIGKILL
    process = start(setting, out, args, processes, path)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return read(setting, out)


def read(setting, out):
    """{steps: [{name: value}], tokens: [{id: token ids}], change: moments of the change}"""
    folder = out / stage_of(setting)
    names = LOGGED[SETTINGS[setting][0]]
    steps = []
    for row in metrics(folder):
        steps.append({name: row[name] for name in names if name in row})

    tokens = [{} for _ in steps]
    for path in sorted(out.glob("tokens.*.jsonl")):
        for line in path.read_text().splitlines():
            row = json.loads(line)
            tokens[row["step"]][row["id"]] = row["tokens"]

    before = load_file(START / "model.safetensors")
    after = weights(folder)
    changes = [(after[name].double() - before[name].double()).flatten() for name in before]
    change = torch.cat(changes)
    moments = {
        "mean_abs": change.abs().mean(),
        "rms": change.square().mean().sqrt(),
        "p4": change.pow(4).mean().pow(0.25),
    }
    moments = {name: float(value) for name, value in moments.items()}
    return {"steps": steps, "tokens": tokens, "change": moments}


def differences(new, old):
    """{name: (largest relative difference of a step, mean signed difference over the steps)}"""
    result = {}
    for name in old["steps"][-1]:
        pairs = zip(new["steps"], old["steps"], strict=True)
        pairs = [(a[name], b[name]) for a, b in pairs if name in b]
        relative = [(a - b) / max(abs(b), SMALLEST) for a, b in pairs]
        result[name] = max(map(abs, relative)), abs(sum(relative)) / len(relative)
    for name, value in old["change"].items():
        relative = (new["change"][name] - value) / value
        result[f"change, {name}"] = abs(relative), 0.0
    return result


def other_samples(new, old):
    """The share of completions that are other tokens."""
    same = []
    for new_step, old_step in zip(new["tokens"], old["tokens"], strict=True):
        for name, group in old_step.items():
            same += [a == b for a, b in zip(new_step[name], group, strict=True)]
    # SFT samples nothing.
    return same.count(False) / max(1, len(same))


@pytest.mark.parametrize(
    ("setting", "way", "args", "processes"), WAYS, ids=[f"{s}, {w}" for s, w, _, _ in WAYS]
)
def test_trajectories(tmp_path, request, device, setting, way, args, processes):
    if processes > 1:
        request.getfixturevalue("several_processes")
    if "compiled" in way and not shutil.which("g++"):
        pytest.skip("torch.compile needs a C++ compiler: g++")
    old = json.loads(STORED.read_text())[setting]
    new = run(setting, tmp_path, args, processes, old["tokens"], interrupt="killed" in way)
    for name, (of_step, of_mean) in differences(new, old).items():
        assert of_step <= tolerance("trajectory, step", device), name
        assert of_mean <= tolerance("trajectory, mean", device), name
    assert other_samples(new, old) <= tolerance("trajectory, other samples", device)


def test_the_settings_train():
    """Every part of the loss counts: rewards differ, and the policy leaves the reference."""
    for setting, trajectory in json.loads(STORED.read_text()).items():
        for step in trajectory["steps"]:
            assert step["grad_norm"] > 1e-3, setting
        if stage_of(setting) == "sft":
            continue
        assert trajectory["steps"][-1]["kl"] > 1e-3, setting
        assert len({step["reward"] for step in trajectory["steps"]}) > 1, setting
        groups = chain.from_iterable(step.values() for step in trajectory["tokens"])
        lengths = {len(ids) for group in groups for ids in group}
        assert len(lengths) > 3, setting


def record(stored, chosen, folder):
    """Run settings, and write trajectories.json with them."""
    for setting in chosen or SETTINGS:
        new = stored[setting] = run(setting, folder / setting)
        print(setting, json.dumps(new["steps"], indent=1), new["change"])
    lines = []
    for name in SETTINGS:
        trajectory = json.dumps(stored[name], separators=(",", ":"))
        lines.append(f"{json.dumps(name)}: {trajectory}")
    STORED.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def compare(stored, chosen, folder):
    """Run settings in all ways, and print how they differ from trajectories.json."""
    for setting, way, args, processes in WAYS:
        if chosen and setting not in chosen:
            continue
        old = stored[setting]
        out = folder / setting / way
        new = run(setting, out, args, processes, old["tokens"], "killed" in way)
        print(f"{setting}, {way}: {other_samples(new, old):.3f} of samples are others")
        for name, (of_step, of_mean) in differences(new, old).items():
            print(f"    {name:28} step {of_step:.1e}, mean {of_mean:.1e}")


def main():
    command, *chosen = sys.argv[1:]
    stored = json.loads(STORED.read_text()) if STORED.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        {"record": record, "compare": compare}[command](stored, chosen, Path(folder))


if __name__ == "__main__":
    main()
