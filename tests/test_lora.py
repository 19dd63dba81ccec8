"""Adapters against the arithmetic written out, against the model without them, and against the peft package."""

import copy
import dataclasses

import peft
import pytest
import torch
from transformers import AutoModelForImageTextToText

import data
import model

SECTION = data.GRPOConfig(lora_rank=3, lr=1e-2)


@pytest.fixture
def adapted(policy, config, tmp_path):
    """A copy of the session's policy, saved in tmp_path/base, with adapters that matter."""
    policy.save(tmp_path / "base")
    one = model.Policy(
        copy.deepcopy(policy.model), policy.processor, config, str(tmp_path / "base")
    )
    one.add_lora(SECTION)
    generator = torch.Generator().manual_seed(3)
    for layer in one.adapted.values():
        layer.lora_B.data = torch.randn(layer.lora_B.shape, generator=generator) / 10
    return one


def score(policy, examples):
    ids = [[torch.arange(30, 40), torch.arange(50, 53)], [torch.arange(70, 78)]]
    logp, _, mask = policy.logprobs([policy.encode(e) for e in examples[:2]], ids)
    return logp[mask]


def test_adapters_start_as_nothing_and_come_off(policy, config, adapted, examples):
    fresh = model.Policy(copy.deepcopy(policy.model), policy.processor, config)
    fresh.add_lora(SECTION)
    before = score(policy, examples)
    assert torch.equal(score(fresh, examples), before)
    with adapted.without_adapters():
        assert torch.equal(score(adapted, examples), before)  # the reference, exactly
    assert (score(adapted, examples) - before).abs().max() > 0.01


def test_only_the_named_layers_learn(policy, adapted, examples):
    layers = policy.model.config.text_config.num_hidden_layers
    assert len(adapted.adapted) == 7 * layers and len(adapted.parameters()) == 14 * layers
    frozen = {n: p.clone() for n, p in adapted.model.named_parameters() if not p.requires_grad}
    optimizers = model.make_optimizers(adapted, SECTION)
    assert adapted.vision_frozen  # so its features are kept
    before = [p.clone() for p in adapted.parameters()]
    (-score(adapted, examples).sum()).backward()
    assert model.optimizer_step(adapted, optimizers, 1e-2, 1.0) > 0
    assert not any(torch.equal(a, b) for a, b in zip(before, adapted.parameters()))
    assert all(
        torch.equal(p, frozen[n]) for n, p in adapted.model.named_parameters() if n in frozen
    )


def test_gradients_equal_those_of_the_product_written_out(policy, adapted, examples):
    """d/dA and d/dB through W + 2 B A, built by hand for one layer."""
    name, layer = next(iter(adapted.adapted.items()))
    loss = score(adapted, examples).sum()
    got = torch.autograd.grad(loss, [layer.lora_A, layer.lora_B])
    plain = copy.deepcopy(policy)
    plain.model.load_state_dict(adapted.merged())
    assert (score(plain, examples) - score(adapted, examples)).abs().max() < 1e-4
    (gradient,) = torch.autograd.grad(
        score(plain, examples).sum(), [plain.model.get_submodule(name).weight]
    )
    for a, b in zip(got, (2 * layer.lora_B.T @ gradient, 2 * gradient @ layer.lora_A.T)):
        assert (a - b).norm() < 1e-4 * b.norm()


def test_saved_merged_and_for_peft(adapted, config, examples, tmp_path):
    """The folder is a plain model; the adapters load in peft on the base, with the same logits; and here, to go on."""
    folder = tmp_path / "step"
    adapted.save(folder)
    merged = model.load_policy(config, folder)
    assert (
        not merged.adapted
        and (score(merged, examples) - score(adapted, examples)).abs().max() < 1e-4
    )

    batch = adapted.encode(examples[0])
    with torch.no_grad():
        wanted = adapted.model(**batch).logits
        theirs = peft.PeftModel.from_pretrained(
            AutoModelForImageTextToText.from_pretrained(tmp_path / "base"), folder / "adapter"
        )
        assert (theirs(**batch).logits - wanted).abs().max() < 1e-4
        assert torch.allclose(merged.model(**batch).logits, wanted, atol=1e-4)

    again = model.load_policy(config, tmp_path / "base")
    again.add_lora(SECTION)
    again.load_adapters(folder / "adapter")
    assert torch.equal(score(again, examples), score(adapted, examples))


def test_sampling_uses_the_adapters(adapted, examples):
    (rollout,) = adapted.sample(examples[:1], 2, 8, 1.0, (1,))
    logp, _, mask = adapted.logprobs([rollout.prompt], [rollout.tokens])
    assert (logp[mask] - torch.cat(rollout.logprobs)).abs().max() < 1e-5
    with adapted.without_adapters():
        assert (adapted.logprobs([rollout.prompt], [rollout.tokens])[0] - logp)[
            mask
        ].abs().max() > 1e-3


def test_unknown_targets_are_named(policy, config):
    one = model.Policy(copy.deepcopy(policy.model), policy.processor, config)
    with pytest.raises(data.InputError, match="q_projection.*are .*q_proj"):
        one.add_lora(dataclasses.replace(SECTION, lora_targets=["q_projection"]))
