"""Adapters against the arithmetic written out, the model without them, and the package peft."""

import copy
import dataclasses

import peft
import pytest
import torch
from helpers import (
    SMALL,
    distance,
    is_repeated,
    load,
    recorded,
    relative_distance,
    score_all,
    seeded,
    tolerance,
)
from transformers import AutoModelForImageTextToText

from model import Optimizer, load_frozen, load_policy
from runtime.config import InputError

RANK = 3

pytestmark = pytest.mark.gpu


def with_adapters(policy):
    one = copy.deepcopy(policy)
    one.add_lora(RANK)
    return one


@pytest.fixture
def adapted(policy, tmp_path):
    """A copy of the shared policy, saved in tmp_path/base, with adapters that matter."""
    policy.save(tmp_path / "base")
    one = with_adapters(policy)
    one.path = str(tmp_path / "base")
    generator = seeded(3)
    for layer in one.adapted.values():
        layer.lora_B.data.copy_(torch.randn(layer.lora_B.shape, generator=generator) / 10)
    return one


def score(policy, examples):
    """Log-probs of three completions of two prompts, (N,)."""
    ids = torch.arange(30, 80, device=policy.device)
    ids = [[ids[:10], ids[20:23]], [ids[40:48]]]
    logp, _, mask = policy.logprobs([policy.encode(e) for e in examples[:2]], ids)
    return logp[mask]


def test_adapters_start_as_nothing_and_come_off(policy, adapted, examples):
    before = score(policy, examples)
    assert is_repeated(score(with_adapters(policy), examples), before)
    # The reference, exactly.
    with adapted.without_adapters():
        assert is_repeated(score(adapted, examples), before)
    assert distance(score(adapted, examples), before) > 0.01


def test_only_the_named_layers_learn(policy, adapted, examples):
    layers = policy.model.config.text_config.num_hidden_layers
    assert len(adapted.adapted) == 7 * layers
    assert len(adapted.parameters()) == 14 * layers
    frozen = {n: p.clone() for n, p in adapted.model.named_parameters() if not p.requires_grad}
    adapted.freeze([])
    # So its features are kept.
    assert adapted.vision_frozen
    optimizer = Optimizer(adapted, "adamw")
    before = [p.clone() for p in adapted.parameters()]
    (-score(adapted, examples).sum()).backward()
    assert optimizer.step(1e-2) > 0
    assert not any(map(torch.equal, before, adapted.parameters()))
    after = dict(adapted.model.named_parameters())
    for name, weight in frozen.items():
        assert torch.equal(after[name], weight), name


def test_gradients_equal_those_of_the_product_written_out(policy, adapted, examples):
    """d/dA and d/dB through W + 2 B A, by hand for one layer."""
    name, layer = next(iter(adapted.adapted.items()))
    scores = score(adapted, examples)
    got_a, got_b = torch.autograd.grad(scores.sum(), [layer.lora_A, layer.lora_B])
    plain = copy.deepcopy(policy)
    # The tied head is there once.
    plain.model.load_state_dict(adapted.whole_weights()[0], strict=False)
    merged = score(plain, examples)
    limit = tolerance("library", policy.device)
    assert distance(merged, scores) < limit
    weight = plain.model.get_submodule(name).weight
    (gradient,) = torch.autograd.grad(merged.sum(), [weight])
    assert relative_distance(got_a, 2 * layer.lora_B.T @ gradient) < limit
    assert relative_distance(got_b, 2 * gradient @ layer.lora_A.T) < limit


def test_the_saved_folder_is_a_plain_model(adapted, config, examples, tmp_path):
    adapted.save(tmp_path / "step")
    merged = load_policy(config, tmp_path / "step")
    assert not merged.adapted
    gap = distance(score(merged, examples), score(adapted, examples))
    assert gap < tolerance("library", adapted.device)


def test_saved_adapters_load_here(adapted, config, examples, tmp_path):
    adapted.save(tmp_path / "step")
    again = load_policy(config, tmp_path / "base")
    again.add_lora(RANK)
    again.load_adapters(tmp_path / "step" / "adapter")
    assert is_repeated(score(again, examples), score(adapted, examples))


def test_saved_adapters_load_in_peft(adapted, examples, tmp_path):
    """On the base, with the same logits."""
    adapted.save(tmp_path / "step")
    base = AutoModelForImageTextToText.from_pretrained(tmp_path / "base")
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "step" / "adapter")
    theirs.to(adapted.device)
    prompt = adapted.encode(examples[0])
    with torch.no_grad():
        wanted = adapted.model(**prompt.tokens, **prompt.images).logits
        got = theirs(**prompt.tokens, **prompt.images).logits
    assert distance(got, wanted) < tolerance("library", adapted.device)


@pytest.fixture
def small_change(tmp_path):
    """A policy in bfloat16 with adapters too small for it, saved in tmp_path/step."""
    policy = load_policy(load(*SMALL, "model.precision=bfloat16"))
    policy.add_lora(RANK)
    policy.freeze([])
    for layer in policy.adapted.values():
        layer.lora_B.data.copy_(torch.randn(layer.lora_B.shape, generator=seeded(4)) / 1e4)
    policy.save(tmp_path / "step")
    return policy


def test_what_is_evaluated_is_what_was_trained(small_change, examples, tmp_path):
    """Not its weights, rounded to bfloat16: most of them are those of the start again."""
    trained = score(small_change, examples).detach()
    again = load_frozen(small_change.config, tmp_path / "step")
    assert not again.parameters()
    assert is_repeated(score(again, examples), trained)

    merged = load_policy(small_change.config, tmp_path / "step").freeze_all()
    assert not is_repeated(score(merged, examples), trained)
    same = []
    for name, layer in small_change.adapted.items():
        same.append((merged.model.get_submodule(name).weight == layer.weight).float().mean())
    assert min(same) > 0.5


def test_merged_weights_are_made_on_the_cpu(small_change):
    state, _ = small_change.whole_weights()
    for name, layer in small_change.adapted.items():
        merged = state[f"{name}.weight"]
        assert (merged.device.type, merged.dtype) == ("cpu", torch.float32)
        change = 2 * layer.lora_B.float() @ layer.lora_A.float()
        wanted = layer.weight.float() + change
        assert distance(merged, wanted.cpu()) < tolerance("library", layer.weight.device)


def test_the_head_has_no_adapters(policy, config):
    """It is not run as a layer, so they would never learn."""
    one = copy.deepcopy(policy)
    one.config = dataclasses.replace(
        config, model=dataclasses.replace(config.model, lora_targets=["lm_head", "q_proj"])
    )
    with pytest.raises(InputError, match=r"lm_head.*are "):
        one.add_lora(RANK)


def test_sampling_uses_the_adapters(adapted, examples):
    rollouts = adapted.sample(examples[:1], 2, 8, 1.0, (1,))
    logp = score_all(adapted, rollouts)
    assert distance(logp, recorded(rollouts)) < tolerance("log-probs", adapted.device)
    with adapted.without_adapters():
        assert distance(score_all(adapted, rollouts), logp) > 1e-3


def test_unknown_targets_are_named(policy, config, monkeypatch):
    wrong = dataclasses.replace(config.model, lora_targets=["q_projection"])
    monkeypatch.setattr(policy, "config", dataclasses.replace(config, model=wrong))
    with pytest.raises(InputError, match=r"q_projection.*are .*q_proj"):
        policy.add_lora(RANK)
