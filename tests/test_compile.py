"""model.compile: compiled layers equal the plain ones, and are compiled once for all lengths."""

import shutil

import pytest
import torch
from helpers import SMALL, START, distance, load, random_completions, tolerance
from torch._dynamo.utils import counters

import data
from model import load_policy

# Lengths of the completions of one to four prompts. Nothing may depend on any of them.
BATCHES = [
    [[12, 7], [5, 9]],
    [[3], [22], [14]],
    [[17, 4, 8]],
    [[6, 2], [3, 3], [9, 9], [1, 2]],
    [[30] * 8] * 2,
    [[1]],
]

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler: g++"),
]


@pytest.fixture(scope="module")
def prompts(policy):
    examples = data.load_split(load(*SMALL), "train")[:4]
    return [policy.encode(example) for example in examples]


def load_start(*settings):
    """Weights for which log-probs are far from uniform."""
    return load_policy(load(*SMALL, f"model.path={START}", *settings))


def score(policy, prompts, lengths):
    """Log-probs of random completions, and the gradients of a sum of them."""
    completions = random_completions(lengths, len(lengths), policy.device)
    policy.model.zero_grad()
    logp, _, _ = policy.logprobs(prompts[: len(lengths)], completions, 0.7)
    # Each token counts differently, so that no gradient cancels.
    (logp * torch.arange(1.0, 1 + logp.shape[1], device=logp.device)).sum().backward()
    gradients = [p.grad.flatten() for p in policy.parameters() if p.grad is not None]
    return logp.detach(), torch.cat(gradients)


def relative(a, b):
    return distance(a, b) / float(b.abs().max())


@pytest.mark.parametrize("settings", [[], ["model.gradient_checkpointing=true"]])
def test_compiled_layers_equal_plain_ones_and_are_compiled_once(prompts, settings):
    compiled = load_start("model.compile=true", *settings)
    plain = load_start()
    torch.compiler.reset()
    counters.clear()
    for i, lengths in enumerate(BATCHES):
        if i == 1:
            graphs = counters["stats"]["unique_graphs"]
            assert graphs > 0
        # From the second batch on, another graph would be an error.
        with torch.compiler.set_stance("fail_on_recompile" if i else "default"):
            logp, gradient = score(compiled, prompts, lengths)
        plain_logp, plain_gradient = score(plain, prompts, lengths)
        assert relative(logp, plain_logp) < tolerance("log-probs", logp.device)
        assert relative(gradient, plain_gradient) < tolerance("gradients", logp.device)
    assert counters["stats"]["unique_graphs"] == graphs


def test_in_bfloat16_compiled_layers_are_as_close_to_float32(prompts):
    half = "model.precision=bfloat16"
    exact = score(load_start(), prompts, BATCHES[0])
    plain = score(load_start(half), prompts, BATCHES[0])
    compiled = score(load_start(half, "model.compile=true"), prompts, BATCHES[0])
    for i in range(2):
        assert 0 < distance(compiled[i], exact[i]) < 2 * distance(plain[i], exact[i])


def test_sampling_compiles_nothing(prompts):
    policy = load_start("model.compile=true")
    examples = data.load_split(policy.config, "train")[:2]
    counters.clear()
    policy.sample(examples, 2, 4, 1.0)
    assert counters["stats"]["unique_graphs"] == 0
