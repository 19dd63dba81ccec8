"""The memory plan against what a step really keeps."""

import pytest
import torch
from helpers import SMALL, load, random_completions

import data
from model import Optimizer, load_policy
from tools.plan_memory import memory_plan, plan

pytestmark = pytest.mark.gpu


class Kept:
    """The bytes of what autograd saves for the backward, without the weights."""

    def __init__(self, weights):
        self.weights = {p.data_ptr() for p in weights}
        self.storages = {}

    def keep(self, tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.weights:
            # The tensor stays, so that no other takes its place.
            self.storages[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    def give_back(self, tensor):
        return tensor

    def total(self):
        return sum(size for size, _ in self.storages.values())


@pytest.mark.parametrize("frozen", ["[vision, projector]", "[]"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_memory_plan_is_what_a_step_keeps(examples, frozen, precision):
    """Activations nearly, weights, gradients and optimiser states byte for byte."""
    config = load(
        *SMALL,
        "grpo.micro_tokens=1500",
        "grpo.group_size=8",
        "grpo.max_new_tokens=80",
        f"grpo.freeze={frozen}",
        f"model.precision={precision}",
    )
    policy = load_policy(config)
    policy.freeze(config.grpo.freeze)
    optimizer = Optimizer(policy, config.grpo.optimizer)
    expected = memory_plan(policy, config, config.grpo)
    completions = random_completions([[80] * 8] * 2, 0, policy.device)
    kept = Kept(policy.model.parameters())
    with torch.autograd.graph.saved_tensors_hooks(kept.keep, kept.give_back):
        logp, _, _ = policy.logprobs([policy.encode(e) for e in examples[:2]], completions)
        loss = -logp.mean()
    loss.backward()
    assert 0.8 < kept.total() / expected["activations"] < 1.05
    assert expected["weights"] == sum(p.nbytes for p in policy.model.parameters())
    assert expected["gradients"] == sum(p.grad.nbytes for p in policy.parameters())

    optimizer.step(1e-4)
    (state,) = optimizer.state()
    moments = [t for values in state["state"].values() for t in values.values() if t.ndim]
    assert expected["optimizer"] == sum(t.nbytes for t in moments)


@pytest.fixture
def folder_without_weights(policy, tmp_path):
    policy.save(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    return load(*SMALL, f"model.path={tmp_path}")


def test_a_plan_needs_no_weights(folder_without_weights):
    text = plan(folder_without_weights)
    assert "\nSFT: 2.4 of 2.4 M parameters trained; about " in text
    assert "\nGRPO: 0.7 of 2.4" in text
    assert "keys and values" in text


def test_prompts_need_no_weights(folder_without_weights, policy):
    bare = load_policy(folder_without_weights, weights=False)
    example = data.load_split(folder_without_weights, "val")[0]
    assert torch.equal(bare.encode(example).input_ids, policy.encode(example).input_ids)
