"""The fixed-size decoder, fast/shared_decode.py, against the plain loop of model.py."""

import copy
import dataclasses
import weakref

import numpy as np
import pytest
import torch
from helpers import SMALL, distance, load, move_weights, tolerance
from torch.nn import functional as F  # noqa: N812
from torch.utils._python_dispatch import TorchDispatchMode

from fast.shared_decode import SharedDecoder, shared_decode
from model import load_policy

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def prompts(policy, examples):
    """Of four different lengths; the last has two images."""
    grounding = next(e for e in examples if e.task == "grounding")
    two = dataclasses.replace(examples[0], images=examples[0].images + examples[3].images)
    long = dataclasses.replace(examples[1], question="Describe all that you see. " * 3)
    return [policy.encode(e) for e in (examples[0], grounding, long, two)]


def half_policy():
    policy = load_policy(load(*SMALL, "model.precision=bfloat16"))
    return move_weights(policy, 0.05, seed=1)


@pytest.fixture(params=[False, True], ids=["launched", "as with graphs"])
def graphs(request, monkeypatch, policy):
    """Also the way with graphs, whose replay runs the step instead: it needs no GPU."""
    monkeypatch.setattr(policy, "decoder", None)
    if request.param:
        monkeypatch.setattr(SharedDecoder, "capture", lambda decoder: Replay(decoder))
        made = SharedDecoder.__init__

        def with_graphs(self, *inputs):
            made(self, *inputs)
            self.uses_graphs = True

        monkeypatch.setattr(SharedDecoder, "__init__", with_graphs)


class Replay:
    def __init__(self, decoder):
        self.decoder = decoder
        self.size = decoder.count, decoder.visible

    def replay(self):
        assert self.size == (self.decoder.count, self.decoder.visible)
        self.decoder.step()


def random_numbers(rows, length, seed, device):
    numbers = np.random.default_rng(seed).random((rows, length))
    return torch.tensor(numbers, device=device)


def up_to_stop(policy, tokens):
    """(R, T): each row's tokens with its first stop token. What follows means nothing."""
    stops = torch.isin(tokens, policy.stop_ids).long()
    return stops.cumsum(1) - stops == 0


@torch.no_grad()
def decode_both(policy, prompts, uniform, temperature=1.0):
    """Tokens and log-probs up to the stops, fixed-size and plain, and the lengths of the rows."""
    results = []
    for decode in (lambda *inputs: shared_decode(policy, *inputs), policy.plain_decode):
        with policy.autocast():
            tokens, logprobs = decode(policy.prefill(prompts), uniform, temperature)
        real = up_to_stop(policy, tokens)
        # The plain loop ends with its last row.
        rest = 0, uniform.shape[1] - tokens.shape[1]
        results.append((F.pad(tokens * real, rest), F.pad(logprobs * real, rest)))
    return *results, real.sum(1)


def assert_equal(policy, prompts, uniform, temperature=1.0):
    (tokens, logprobs), (plain_tokens, plain), lengths = decode_both(
        policy, prompts, uniform, temperature
    )
    assert torch.equal(tokens, plain_tokens)
    assert distance(logprobs, plain) < tolerance("log-probs", policy.device)
    return lengths


# ------------------------------------------------------------------------------- float32


@pytest.mark.parametrize("group_size", [1, 3, 8])
@pytest.mark.parametrize("temperature", [0.0, 0.8, 1.0])
def test_rows_of_different_lengths_equal_plain(
    policy, prompts, monkeypatch, graphs, group_size, temperature
):
    """They end at different times and are dropped; the last ones fill more than 64 places."""
    monkeypatch.setattr(policy, "stop_ids", torch.arange(0, 1024, 40, device=policy.device))
    uniform = random_numbers(4 * group_size, 70, group_size, policy.device)
    lengths = assert_equal(policy, prompts, uniform, temperature)
    if group_size == 8 and temperature:
        assert lengths.min() < 10
        assert lengths.max() > 60
        assert len(set(lengths.tolist())) > 15


def test_rows_without_a_stop_equal_plain(policy, prompts, monkeypatch, graphs):
    monkeypatch.setattr(policy, "stop_ids", policy.stop_ids[:0])
    lengths = assert_equal(policy, prompts, random_numbers(12, 40, 1, policy.device))
    assert (lengths == 40).all()


def test_rows_that_stop_at_once_equal_plain(policy, prompts, monkeypatch, graphs):
    monkeypatch.setattr(policy, "stop_ids", torch.arange(1024, device=policy.device))
    lengths = assert_equal(policy, prompts, random_numbers(12, 40, 2, policy.device))
    assert (lengths == 1).all()


def test_one_token_equals_plain(policy, prompts, graphs):
    assert_equal(policy, prompts, random_numbers(8, 1, 3, policy.device))


def test_adapters_take_part(prompts):
    policy = load_policy(load(*SMALL))
    policy.add_lora(4)
    move_weights(policy, 0.05, seed=1)
    uniform = random_numbers(8, 40, 4, policy.device)
    assert_equal(policy, prompts, uniform)
    with_adapters, _, _ = decode_both(policy, prompts, uniform)
    with policy.without_adapters():
        without, _, _ = decode_both(policy, prompts, uniform)
    assert not torch.equal(with_adapters[0], without[0])


# ------------------------------------------------------------------------------- buffers


def test_buffers_serve_later_batches_that_fit(policy, prompts, monkeypatch, graphs):
    """Fewer and shorter prompts, fewer tokens, in another order, after rows have been dropped."""
    monkeypatch.setattr(policy, "decoder", None)
    monkeypatch.setattr(policy, "stop_ids", torch.arange(0, 1024, 40, device=policy.device))
    assert_equal(policy, prompts, random_numbers(12, 70, 5, policy.device))
    decoder = policy.decoder
    for seed, batch in enumerate((prompts[:2], prompts[::-1], prompts[:1], prompts)):
        assert_equal(policy, batch, random_numbers(3 * len(batch), 50, seed, policy.device))
        assert policy.decoder is decoder


@pytest.mark.parametrize(
    ("n_prompts", "rows", "length", "temperature"),
    [(4, 12, 21, 1.0), (3, 12, 20, 1.0), (4, 12, 20, 0.5), (2, 4, 20, 1.0)],
    ids=["longer rows", "other groups", "other temperature", "smaller groups"],
)
def test_a_batch_that_does_not_fit_gets_new_buffers(
    policy, prompts, monkeypatch, n_prompts, rows, length, temperature
):
    monkeypatch.setattr(policy, "decoder", None)
    assert_equal(policy, prompts, random_numbers(12, 20, 6, policy.device))
    decoder = policy.decoder
    uniform = random_numbers(rows, length, 7, policy.device)
    assert_equal(policy, prompts[:n_prompts], uniform, temperature)
    assert policy.decoder is not decoder


def test_a_longer_prompt_gets_new_buffers(policy, prompts, monkeypatch):
    monkeypatch.setattr(policy, "decoder", None)
    shortest, longest = min(prompts, key=len), max(prompts, key=len)
    uniform = random_numbers(3, 9, 8, policy.device)
    for prompt in (shortest, longest):
        assert_equal(policy, [prompt], uniform)


def test_a_decoder_does_not_keep_its_policy(config, examples):
    policy = load_policy(config)
    policy.sample(examples[:1], 2, 4, 1.0)
    assert policy.decoder
    kept = weakref.ref(policy)
    del policy
    assert kept() is None


def test_a_copy_of_a_policy_decodes_with_its_own_weights(policy, prompts):
    uniform = random_numbers(8, 20, 9, policy.device)
    before, _, _ = decode_both(policy, prompts, uniform)
    other = move_weights(copy.deepcopy(policy), 0.05, seed=2)
    assert_equal(other, prompts, uniform)
    after, _, _ = decode_both(other, prompts, uniform)
    assert not torch.equal(before[0], after[0])


# ------------------------------------------------------------------------------- bfloat16


class Casts(TorchDispatchMode):
    """Counts the numbers that are cast to bfloat16 out of something at least as large as `size`."""

    size = 4096

    def __init__(self):
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        half = (kwargs or {}).get("dtype") == torch.bfloat16
        cast = half and function is torch.ops.aten._to_copy.default
        if cast and args[0].numel() >= self.size:
            self.total += args[0].numel()
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_weights_are_cast_once_for_a_batch(examples, lora_rank):
    """Not once more for every token, trained or frozen."""
    policy = half_policy()
    if lora_rank:
        policy.add_lora(lora_rank)
    policy.stop_ids = policy.stop_ids[:0]
    policy.sample(examples[:1], 2, 9, 1.0)
    counts = []
    for length in (2, 9):
        with Casts() as casts:
            policy.sample(examples[:1], 2, length, 1.0)
        counts.append(casts.total)
    assert counts[0] == counts[1] > 0


def test_keys_and_weights_are_held_in_half_precision(prompts):
    policy = half_policy()
    decode_both(policy, prompts, random_numbers(8, 4, 10, policy.device))
    decoder = policy.decoder
    assert {t.dtype for t in decoder.past + decoder.all_own} == {torch.bfloat16}
    projection = decoder.layers[0].mlp.up_proj.weight
    assert projection.dtype == decoder.head.dtype == torch.bfloat16


def test_norms_stay_in_float32(prompts):
    policy = half_policy()
    decode_both(policy, prompts, random_numbers(8, 4, 10, policy.device))
    assert policy.decoder.layers[0].input_layernorm.weight.dtype == torch.float32


def test_half_precision_is_as_close_to_float32_as_plain(policy, prompts):
    """The same tokens scored in float32: fixed-size sampling loses no more than the plain loop."""
    half = half_policy()
    uniform = random_numbers(16, 30, 11, policy.device)
    gaps = []
    for tokens, logprobs in decode_both(half, prompts, uniform)[:2]:
        real = up_to_stop(half, tokens)
        rows = [row[mask] for row, mask in zip(tokens, real)]
        groups = [rows[b : b + 4] for b in range(0, 16, 4)]
        exact, _, mask = policy.logprobs(prompts, groups)
        gaps.append((exact - logprobs[:, : mask.shape[1]])[mask].abs().mean())
    assert 0 < gaps[0] < 1.2 * gaps[1]


def test_trained_weights_reach_the_half_copies(prompts):
    policy = half_policy()
    uniform = random_numbers(8, 20, 12, policy.device)
    before, _, _ = decode_both(policy, prompts, uniform)
    move_weights(policy, 0.05, seed=2)
    after, _, _ = decode_both(policy, prompts, uniform)
    fresh = move_weights(half_policy(), 0.05, seed=2)
    wanted, _, _ = decode_both(fresh, prompts, uniform)
    assert not torch.equal(before[0], after[0])
    assert torch.equal(after[0], wanted[0])
    assert torch.equal(after[1], wanted[1])


# ------------------------------------------------------------------------------- graphs


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_graphs_equal_launched_steps(device, prompts, precision):
    """Several sizes, twice over, so that graphs are replayed with other contents."""
    if device.type != "cuda":
        pytest.skip("CUDA graphs need a GPU")
    policy = load_policy(load(*SMALL, f"model.precision={precision}"))
    move_weights(policy, 0.05, seed=1)
    policy.stop_ids = torch.arange(0, 1024, 40, device=device)
    for seed in (13, 14):
        uniform = random_numbers(32, 70, seed, device)
        results = []
        for graphs in (True, False):
            if policy.decoder:
                policy.decoder.uses_graphs = graphs
            (tokens, logprobs), _, _ = decode_both(policy, prompts, uniform)
            results.append((tokens, logprobs))
        assert torch.equal(results[0][0], results[1][0])
        assert distance(results[0][1], results[1][1]) < tolerance("log-probs", device)
    assert len(policy.decoder.graphs) > 3
