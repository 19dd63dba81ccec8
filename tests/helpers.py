"""What several tests share: tiny settings, random texts and boxes, the plain forward, scripts."""

import ast
import io
import json
import os
import subprocess
import sys
import time
import tokenize
from contextlib import contextmanager
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
# The same from START, so that GRPO has something to learn from: rewards differ within groups.
LEARNING = [
    *SHORT,
    f"model.path={START}",
    "sft.optimizer=adamw",
    "grpo.max_new_tokens=40",
    "grpo.temperature=1",
]


def load(*overrides, config="config.yaml"):
    """A configuration of the project with overrides."""
    return load_config(ROOT / config, overrides)


# ------------------------------------------------------------------------------- tolerances

# What rounding may change in float32, by device. A GPU adds up in another order each time.
TOLERANCE = {
    "cpu": {
        # The same computation twice.
        "repeated": 0.0,
        # Two ways to the same log-probs and gradients.
        "log-probs": 1e-5,
        "gradients": 1e-5,
        # Against another implementation.
        "library": 1e-4,
        # Weights and metrics of a short run that is repeated.
        "training": 0.0,
        # Relative, of what tests/test_trajectories.py stores: of each value of each step, of the
        # mean signed difference over the steps; and the share of completions that are others.
        "trajectory, step": 1e-4,
        "trajectory, mean": 1e-5,
        "trajectory, other samples": 0.05,
    },
    "cuda": {
        "repeated": 1e-4,
        "log-probs": 1e-4,
        "gradients": 1e-3,
        "library": 1e-3,
        "training": 5e-3,
        "trajectory, step": 1e-3,
        "trajectory, mean": 1e-4,
        "trajectory, other samples": 0.1,
    },
}


def tolerance(name, device):
    return TOLERANCE[torch.device(device).type][name]


def distance(a, b):
    """The largest absolute difference of two tensors."""
    return float((a - b).detach().abs().max())


def relative_distance(a, b):
    """The norm of the difference, relative to that of b."""
    return float(((a - b).norm() / b.norm()).detach())


def is_repeated(a, b):
    """The same, bit for bit on the CPU."""
    return distance(a, b) <= tolerance("repeated", a.device)


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


def seeded(seed):
    """A generator on the CPU: random numbers that are the same on every device."""
    return torch.Generator().manual_seed(seed)


def random_completions(lengths, seed, device):
    """A tensor (T,) of ids for each length, group by group. All families have these ids."""
    generator = seeded(seed)

    def random_ids(n):
        return torch.randint(10, 200, (n,), generator=generator).to(device)

    return [list(map(random_ids, group)) for group in lengths]


@torch.no_grad()
def move_weights(policy, scale, seed):
    """The policy with noise on all its weights, so that no part of it is idle."""
    generator = seeded(seed)
    for p in policy.model.parameters():
        p += scale * torch.randn(p.shape, generator=generator).to(p.device)
    return policy


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


def plain_logprobs(policy, prompt, ids, temperature=1.0):
    """(T,) log-probs of ids (T,) after a prompt, from plain_logits."""
    logits = plain_logits(policy, prompt, ids) / temperature
    return logits.log_softmax(-1).gather(1, ids[:, None])[:, 0]


def score_all(policy, rollouts, temperature=1.0):
    """Log-probs of all tokens of the rollouts under the policy, (N,)."""
    prompts = [r.prompt for r in rollouts]
    logp, _, mask = policy.logprobs(prompts, [r.tokens for r in rollouts], temperature)
    return logp[mask]


def recorded(rollouts, name="sampled"):
    """Log-probs that the rollouts keep, (N,), in the order of score_all."""
    groups = [r.logprobs[name] for r in rollouts]
    return torch.cat([row for group in groups for row in group])


def all_tokens(rollouts):
    """The completions of all rollouts, R tensors (T,)."""
    return [ids for r in rollouts for ids in r.tokens]


@contextmanager
def watch_layer(layer):
    """A list of the shapes (B, T) that the layer is called with."""
    shapes = []

    def watch(_, inputs):
        shapes.append(tuple(inputs[0].shape[:-1]))

    with layer.register_forward_pre_hook(watch):
        yield shapes


def check_shared_prefix(policy, examples, group_size, monkeypatch):
    """Scores, gradients and samples with every prompt once are those of plain rows."""
    device = policy.device
    prompts = [policy.encode(e) for e in examples]
    # Of one token and of many.
    cycle = [1 + 6 * (i % 3) for i in range(group_size + len(prompts))]
    lengths = [cycle[b : b + group_size] for b in range(len(prompts))]
    completions = random_completions(lengths, 0, device)
    stream = sum(map(len, prompts)) + sum(map(sum, lengths)) - group_size * len(prompts)
    # Rows end, and are dropped, at different times.
    monkeypatch.setattr(policy, "stop_ids", torch.arange(0, len(policy.tokenizer), 8).to(device))
    trained = dict(policy.model.named_parameters())
    logprobs, gradients, samples = [], [], []
    for shared in (True, False):
        monkeypatch.setattr(policy, "shared", shared)
        with watch_layer(policy.base.language_model.layers[0]) as shapes:
            logp, _, mask = policy.logprobs(prompts, completions)
        if shared:
            # No padding, no prompt twice, no last token.
            assert set(shapes) == {(1, stream)}
        weights = torch.linspace(-1, 1, logp.numel(), device=device).view(logp.shape)
        loss = (logp * weights).sum()
        found = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
        gradients.append({n: g for n, g in zip(trained, found) if g is not None})
        logprobs.append(logp.detach()[mask])
        samples.append(policy.sample(examples, group_size, 20, 1.0, (4, 4)))

    largest = logprobs[1].abs().max()
    assert distance(*logprobs) < tolerance("log-probs", device) * largest
    assert gradients[0].keys() == gradients[1].keys()
    assert any("visual" in name for name in gradients[0])
    for name, gradient in gradients[0].items():
        error = relative_distance(gradient, gradients[1][name])
        assert error < tolerance("gradients", device), name
    assert len({len(ids) for ids in all_tokens(samples[0])}) > 2
    for one, other in zip(*samples):
        assert one.texts == other.texts
    assert distance(*map(recorded, samples)) < tolerance("log-probs", device)


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


def example(task="report", answer="", boxes=(), name="1", style="plain"):
    """An example without an image."""
    return data.Example(name, task, (), question="", answer=answer, boxes=boxes, style=style)


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


# ------------------------------------------------------------------------------- the code itself

SIX = ("train_grpo", "train_sft", "eval", "model", "rewards", "data")


def python_files(*patterns):
    """The project's own files: not those of its user, which git does not know."""
    found = [path for pattern in patterns for path in sorted(ROOT.glob(pattern))]
    command = ["git", "-C", ROOT, "ls-files", "--others"]
    others = subprocess.run(command, capture_output=True, text=True).stdout.splitlines()
    return [path for path in found if str(path.relative_to(ROOT)) not in others]


def docstring_lines(tree):
    lines = set()
    for node in ast.walk(tree):
        kinds = ast.Module | ast.ClassDef | ast.FunctionDef
        if isinstance(node, kinds) and ast.get_docstring(node, clean=False):
            lines |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return lines


def count_tokens(path):
    """Names, operators, numbers and strings; docstrings and comments do not count."""
    text = path.read_text(encoding="utf-8")
    docstrings = docstring_lines(ast.parse(text))
    # From Python 3.12 on, an f-string is many tokens: it counts as the one that it was.
    f_string, f_string_end = (
        getattr(tokenize, f"FSTRING_{part}", None) for part in ("START", "END")
    )
    kinds = (tokenize.NAME, tokenize.OP, tokenize.NUMBER, tokenize.STRING, f_string)
    count, depth = 0, 0
    for item in tokenize.generate_tokens(io.StringIO(text).readline):
        if depth == 0 and item.type in kinds and item.start[0] not in docstrings:
            count += 1
        depth += (item.type == f_string) - (item.type == f_string_end)
    return count
