"""What several tests share: tiny settings, random texts and boxes, the plain forward, scripts."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

import data
from runtime.config import load_config

ROOT = Path(__file__).parents[1]
# A small model that has learnt to write reports and boxes: samples of a group differ in reward.
START = Path(__file__).with_name("start")

# Few and small phantoms.
SMALL = ["data.train_size=40", "data.val_size=6", "data.test_size=8", "model.max_pixels=9216"]
# A whole run of everything in seconds.
SHORT = [
    "data.train_size=24",
    "data.val_size=4",
    "data.test_size=6",
    "model.max_pixels=9216",
    "sft.steps=4",
    "sft.more_steps=2",
    "sft.batch_size=4",
    "sft.eval_every=2",
    "grpo.steps=3",
    "grpo.prompts=4",
    "grpo.group_size=4",
    "grpo.max_new_tokens=12",
    "grpo.save_every=1",
    "grpo.lr=1e-3",
]


def load(*overrides, config="config.yaml"):
    """A configuration of the project with overrides."""
    return load_config(ROOT / config, overrides)


# ------------------------------------------------------------------------------- random inputs


def random_texts(n, seed, longest, words):
    """n texts of 0 to `longest` random words."""
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(words, rng.integers(longest + 1))) for _ in range(n)]


def random_boxes(rng, n, digits=None):
    """n boxes with x1 < x2 and y1 < y2 in the unit square, rounded to `digits`."""
    corners = np.sort(rng.random((n, 2, 2)), axis=1).reshape(n, 4)
    if digits is not None:
        corners = corners.round(digits)
    return [tuple(box) for box in corners.tolist()]


# ------------------------------------------------------------------------------- plain forward


def plain_logits(policy, prompt, ids):
    """(T, V) logits of ids (T,) after a prompt: one whole row through the model's own forward."""
    tokens = {}
    for name, values in prompt.tokens.items():
        rest = torch.zeros_like(ids)
        if name == "input_ids":
            rest = ids
        if name == "attention_mask":
            rest = torch.ones_like(ids)
        tokens[name] = torch.cat([values, rest[None].to(values.dtype)], 1)
    logits = policy.model(**tokens, **prompt.images, use_cache=False).logits[0]
    return logits[-len(ids) - 1 : -1].index_fill(1, policy.banned, -torch.inf)


# ------------------------------------------------------------------------------- scripts


def start_script(script, *args, processes=0, config="config.yaml"):
    """Start `script CONFIG args`, under torchrun with `processes` if it is not 0."""
    launcher = []
    if processes:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [sys.executable, *launcher, str(ROOT / script), str(ROOT / config), *args]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env
    )


def run_script(script, *args, **options):
    """Run it to its end: (exit status, stdout, stderr)."""
    process = start_script(script, *args, **options)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def wait_for_lines(path, count, process):
    """Wait until a file has so many lines, or the process ends."""
    while process.poll() is None:
        if path.exists() and path.read_text().count("\n") >= count:
            return
        time.sleep(0.02)


def metrics(run):
    """The lines of metrics.jsonl of a run folder."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def weights(run):
    return load_file(run / "last" / "model.safetensors")


def largest_difference(a, b):
    """Of two dictionaries of tensors with the same names."""
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def is_one_error_line(err, message):
    """stderr holds one line, an error that contains `message`."""
    lines = [line for line in err.splitlines() if line.strip()]
    return len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0]


# ------------------------------------------------------------------------------- rewards


def example(task="report", answer="", boxes=(), name="1"):
    """An example without an image."""
    return data.Example(id=name, task=task, images=(), question="", answer=answer, boxes=boxes)


def phantom_reports(seed, n):
    """The reports of n phantoms."""
    config = load(f"seed={seed}", f"data.test_size={n}", "data.tasks=[report]")
    return [e.answer for e in data.load_split(config, "test")]


# What a model may write and no reward may stumble over.
NASTY = [
    "no " * 33_000,
    "heart normal " * 8_000,
    "a" * 100_000,
    "[1" * 50_000,
    "[" + "1" * 100_000,
    "<think>" * 15_000,
    "\n" * 100_000,
    "tip " + "a-" * 50_000,
    "xxx_" * 25_000,
    ", the " * 17_000,
    "." * 100_000,
    "interstitial " * 8_000,
    "[" + " " * 100_000,
    "[0,0,1,1]" * 11_000,
    "".join(map(chr, range(1, 60_000, 3))),
    "\x00\ud800 \u0130",
]
