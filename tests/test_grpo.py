"""GRPO's mathematics against numbers by hand, exact enumeration, and loops in float64."""

import copy
import dataclasses
import math
from collections import Counter

import numpy as np
import pytest
import torch
from helpers import SMALL, all_tokens, distance, load, plain_logprobs, recorded, seeded, tolerance

import data
import train_grpo
from data import Example
from model import Rollout
from runtime.config import GRPOConfig
from train_grpo import (
    GAP,
    group_advantages,
    grpo_loss,
    kl_terms,
    policy_loss,
    record_logprobs,
    token_weights,
    update,
)


def float64(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


def ragged(rng, rows=6, length=7):
    """A mask (R, T) of rows of random lengths, the first of all tokens."""
    lengths = torch.tensor(rng.integers(1, length + 1, rows))
    lengths[0] = length
    return torch.arange(length)[None] < lengths[:, None]


# ------------------------------------------------------------------------------- advantages


def test_advantages_by_hand():
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.5, 0.5, 0.5, 0.5]])
    centred = torch.tensor([[0.5, -0.5, -0.5, 0.5], [0.0] * 4])
    # The first group's, with n - 1.
    std = math.sqrt(4 * 0.25 / 3)
    assert torch.allclose(group_advantages(rewards, "group"), centred / (std + 1e-4))
    assert torch.equal(group_advantages(rewards, "none"), centred)
    batch_std = float(np.std(rewards.numpy(), ddof=1))
    assert torch.allclose(group_advantages(rewards, "batch"), centred / (batch_std + 1e-4))


@pytest.mark.parametrize("norm", ["group", "none", "batch"])
def test_advantages_of_degenerate_groups(norm):
    # Groups of one: no NaN.
    assert not group_advantages(torch.tensor([[0.7], [0.1]]), norm).any()
    # Rounding is no difference.
    nearly = torch.tensor([[0.3, 0.3 + 3e-8, 0.3, 0.3]])
    assert not group_advantages(nearly, norm).any()
    assert group_advantages(torch.tensor([[0.3, 0.31, 0.3, 0.3]]), norm).any()


@pytest.mark.parametrize("norm", ["group", "batch"])
def test_parts_are_normalised_one_by_one(norm):
    """Each over the groups of its task: the other task's do not widen the std of the batch."""
    config = load(*SMALL, "grpo.normalize_parts=true", "grpo.group_size=4", f"grpo.adv_norm={norm}")
    parts = [
        {"mccs": [0.0, 1.0, 0.0, 1.0], "label_f1": [0.010, 0.020, 0.020, 0.010]},
        {"soft_f1": [0.3, 0.9, 0.4, 0.4]},
        {"mccs": [0.5, 0.6, 0.5, 0.5], "label_f1": [0.0, 0.0, 1.0, 0.0]},
    ]
    rollouts = []
    for task, components in zip(("report", "grounding", "report"), parts):
        example = Example("a", task, (), "", "")
        rollouts.append(Rollout(example, None, [], reward_components=components))
    train_grpo.assign_advantages(rollouts, config)

    def normalised(*groups):
        return group_advantages(torch.tensor(groups), norm)

    mccs = normalised(parts[0]["mccs"], parts[2]["mccs"])
    label_f1 = normalised(parts[0]["label_f1"], parts[2]["label_f1"])
    report, grounding = config.rewards.report, config.rewards.grounding
    expected = report["mccs"] * mccs + report["label_f1"] * label_f1
    got = torch.stack([rollouts[0].advantages, rollouts[2].advantages])
    assert torch.allclose(got, expected)
    soft_f1 = normalised(parts[1]["soft_f1"])[0]
    assert torch.allclose(rollouts[1].advantages, grounding["soft_f1"] * soft_f1)


# ------------------------------------------------------------------------------- the loss


def loss_by_loops(logp, old, ref, advantages, mask, grpo):
    """The loss, and how many tokens are clipped from below."""
    sequences, clipped = [], 0
    for i in range(len(mask)):
        n = int(mask[i].sum())
        a = float(advantages[i])
        log_ratios = [float(logp[i, t] - old[i, t]) for t in range(n)]
        if grpo.importance == "sequence":
            log_ratios = [sum(log_ratios) / n] * n
        terms = []
        for t in range(n):
            ratio = math.exp(log_ratios[t])
            surrogate = min(ratio * a, min(max(ratio, 0.8), 1.28) * a)
            d = float(ref[i, t] - logp[i, t])
            terms.append(-surrogate + grpo.kl_coef * (math.exp(d) - d - 1))
            clipped += ratio < 0.8 and a < 0
        sequences.append(terms)
    if grpo.loss_agg == "token":
        return np.mean(np.concatenate(sequences)), clipped
    if grpo.loss_agg == "sequence":
        return np.mean([np.mean(terms) for terms in sequences]), clipped
    return sum(map(sum, sequences)) / (len(mask) * grpo.max_new_tokens), clipped


@pytest.mark.parametrize("importance", ["token", "sequence"])
@pytest.mark.parametrize("agg", ["token", "sequence", "constant"])
def test_loss_equals_loops(importance, agg):
    rng = np.random.default_rng([3, importance == "token", len(agg)])
    mask = ragged(rng)
    logp, old, ref = (torch.tensor(rng.normal(-2, 0.6, mask.shape)) for _ in range(3))
    advantages = torch.tensor(rng.normal(size=len(mask)))
    grpo = GRPOConfig(importance=importance, loss_agg=agg, kl_coef=0.1, max_new_tokens=9)
    weights = token_weights(mask, agg, int(mask.sum()), len(mask), grpo.max_new_tokens)
    loss, values = grpo_loss(logp, old, ref, advantages, mask, weights, grpo)

    expected, clipped = loss_by_loops(logp, old, ref, advantages, mask, grpo)
    assert float(loss) == pytest.approx(expected, rel=1e-6)
    assert float(values["clip_ratio/low_mean"][mask].sum()) == clipped
    assert clipped or importance == "sequence"


@pytest.mark.parametrize(("sign", "silent"), [(1.0, [0, 1, 0, 0]), (-1.0, [0, 0, 1, 0])])
def test_gradient_of_the_clipped_objective(sign, silent):
    """A token pushes by -A r; it is silent where clipping binds in the direction of the push."""
    ratio = float64(1.0, 1.5, 0.5, 1.1)
    logp = ratio.log()[None].requires_grad_()
    mask = torch.ones(1, 4, dtype=torch.bool)
    old = torch.zeros_like(logp)
    loss, _ = policy_loss(logp, old, float64(sign), mask, 0.2, 0.28)
    (gradient,) = torch.autograd.grad(loss.sum(), logp)
    assert torch.allclose(gradient[0], -sign * ratio * (1 - torch.tensor(silent)))


def test_kl_estimators_against_the_exact_divergence():
    rng = np.random.default_rng(5)
    p, q = (torch.tensor(rng.normal(size=50)).log_softmax(0) for _ in range(2))
    exact = float((p.exp() * (p - q)).sum())
    # Every outcome once.
    terms = kl_terms(p, q)
    assert float((p.exp() * terms["k1"]).sum()) == pytest.approx(exact)
    assert float((p.exp() * terms["k3"]).sum()) == pytest.approx(exact)
    assert float(terms["k3"].min()) >= 0
    assert torch.allclose(terms["k2"], (p - q) ** 2 / 2)
    # expm1: no cancellation.
    tiny = kl_terms(torch.zeros(1), torch.full((1,), -1e-4))["k3"]
    assert float(tiny) == pytest.approx(5e-9, rel=1e-3)


@pytest.mark.parametrize("agg", ["token", "sequence", "constant"])
def test_micro_batches_add_up(agg):
    """Splitting a batch into micro-batches of any sizes leaves every token's weight as it was."""
    mask = ragged(np.random.default_rng(8), rows=9)
    n_tokens = int(mask.sum())
    whole = token_weights(mask, agg, n_tokens, 9, 7)
    parts = [token_weights(m, agg, n_tokens, 9, 7) for m in mask.split([2, 1, 6])]
    assert torch.equal(whole, torch.cat(parts))


# ------------------------------------------------------------------------------- updates


class Descent:
    """Gradient descent, which keeps the last gradients by their names."""

    def __init__(self, policy):
        self.model = policy.model
        self.gradients = {}

    @torch.no_grad()
    def step(self, lr):
        named = dict(self.model.named_parameters())
        self.gradients = {n: p.grad for n, p in named.items() if p.grad is not None}
        self.model.zero_grad()
        for name, gradient in self.gradients.items():
            named[name] -= lr * gradient
        return 0.0


def section(**changes):
    changes = {"group_size": 8, "micro_batch": 4, "max_new_tokens": 12} | changes
    return GRPOConfig(**changes)


def total(result, name):
    """The sum over all micro-batches of an update."""
    return sum((Counter(part) for part in result.sums), Counter())[name]


@pytest.fixture(scope="module")
def sampled(policy, config, examples):
    """Groups of random rewards, the second of equal ones, with a reference nearby."""
    chosen = data.grpo_batch(examples, 0, load(*SMALL, "grpo.prompts=4", "data.report_share=0.5"))
    rollouts = policy.sample(chosen, 8, 12, 1.0, (0, 0))
    generator = seeded(2)
    for r in rollouts:
        r.rewards = torch.rand(8, generator=generator).tolist()
        noise = [torch.randn(n, generator=generator).to(policy.device) for n in r.lengths]
        r.logprobs["reference"] = [a + b / 5 for a, b in zip(r.logprobs["sampled"], noise)]
    rollouts[1].rewards = [0.5] * 8
    train_grpo.assign_advantages(rollouts, config)
    return rollouts


@pytest.fixture
def rollouts(sampled):
    """With log-probs of their own, which updates add to."""
    return [dataclasses.replace(r, logprobs=dict(r.logprobs)) for r in sampled]


def gradients(policy, rollouts, **changes):
    """The gradients of one update, which changes no weight, and what it logs."""
    descent = Descent(policy)
    result = update(policy, descent, rollouts, 0.0, section(**changes))
    return descent.gradients, result


def largest(gradients):
    return max(float(g.abs().max()) for g in gradients.values())


def largest_gap(a, b):
    assert a.keys() == b.keys()
    return max(distance(a[name], b[name]) for name in a)


@pytest.mark.gpu
def test_update_equals_the_plain_objective(policy, rollouts):
    """The whole update against -mean(A log p) of plain rows through the model's own forward."""
    got, result = gradients(policy, rollouts, kl_coef=0.0, micro_batch=3)
    n_tokens = sum(map(len, all_tokens(rollouts)))
    objective = 0.0
    for r in rollouts:
        for ids, advantage in zip(r.tokens, r.advantages):
            logp = plain_logprobs(policy, r.prompt, ids)
            objective = objective - advantage.to(policy.device) * logp.sum() / n_tokens
    named = dict(policy.model.named_parameters())
    expected = torch.autograd.grad(objective, list(named.values()))
    expected = dict(zip(named, expected))

    scale = largest(expected)
    assert scale > 1e-4
    assert largest_gap(got, expected) < tolerance("gradients", policy.device) * scale
    assert total(result, "tokens") == n_tokens
    gap = max(part[f"{GAP}/max"] for part in result.sums)
    assert gap < tolerance("library", policy.device)


@pytest.mark.gpu
def test_micro_batch_size_does_not_change_the_gradient(policy, rollouts):
    one, _ = gradients(policy, rollouts, micro_batch=1, kl_coef=0.1)
    four, _ = gradients(policy, rollouts, micro_batch=4, kl_coef=0.1)
    assert largest(one) > 1e-4
    assert largest_gap(one, four) < tolerance("gradients", policy.device) * largest(one)


@pytest.mark.gpu
def test_drop_degenerate_leaves_the_group_out_of_the_denominator(policy, rollouts):
    without = [rollouts[0], *rollouts[2:]]
    expected, _ = gradients(policy, without, drop_degenerate=False)
    got, result = gradients(policy, rollouts, drop_degenerate=True)
    assert total(result, "tokens") == sum(map(len, all_tokens(without)))
    limit = tolerance("gradients", policy.device)
    assert largest_gap(got, expected) < limit * largest(expected)
    # It would count otherwise.
    kept, _ = gradients(policy, rollouts, drop_degenerate=False)
    assert largest_gap(kept, expected) > 0.01 * largest(expected)


@pytest.mark.gpu
def test_a_step_of_degenerate_groups_changes_nothing(policy, rollouts):
    descent = Descent(policy)
    result = update(policy, descent, rollouts[1:2], 1.0, section(drop_degenerate=True))
    assert result.sums == []
    assert result.grad_norm == 0
    assert not descent.gradients


@pytest.mark.gpu
def test_several_updates_use_fixed_old_logprobs(policy, rollouts):
    """After the policy has moved, ratios are taken against the recorded log-probs."""
    moved = copy.deepcopy(policy)
    grpo = section(micro_batch=2)
    for r in rollouts:
        del r.logprobs["reference"]
    record_logprobs(policy, rollouts, "reference", grpo)
    for r in rollouts:
        assert [len(row) for row in r.logprobs["reference"]] == r.lengths
    first = update(moved, Descent(moved), rollouts, 0.1, grpo)
    old = recorded(rollouts, "old")
    limit = tolerance("log-probs", policy.device)
    assert distance(old, recorded(rollouts, "reference")) < limit
    second = update(moved, Descent(moved), rollouts, 0.1, grpo)
    assert torch.equal(recorded(rollouts, "old"), old)

    n_tokens = total(first, "tokens")
    assert total(first, "ratio") / n_tokens == pytest.approx(1, rel=limit)
    assert abs(total(first, "kl/k1")) < 1e-3
    assert abs(total(second, "ratio") / n_tokens - 1) > 1e-4
    assert total(second, "kl/k3") > 1e-6


@pytest.mark.gpu
def test_the_gap_to_sampling_is_taken_for_the_weights_that_sampled(policy, rollouts):
    """In the second epoch the policy is far from them, and the sampler is as right as before."""
    moved = copy.deepcopy(policy)
    descent = Descent(moved)
    grpo = section(kl_coef=0.0)
    updates = [update(moved, descent, rollouts, 1.0, grpo) for _ in range(2)]
    metrics = train_grpo.update_metrics(updates)
    assert abs(metrics["ratio"] - 1) > 0.01
    assert metrics[f"{GAP}/max"] < tolerance("library", policy.device)
    assert metrics[f"{GAP}/mean"] < metrics[f"{GAP}/max"]


@pytest.mark.gpu
def test_preflight_runs_the_largest_update_and_leaves_nothing(
    policy, examples, config, monkeypatch
):
    seen = []
    logprobs = policy.logprobs

    def watched(prompts, completions, *more):
        seen.append([list(map(len, group)) for group in completions])
        return logprobs(prompts, completions, *more)

    monkeypatch.setattr(policy, "logprobs", watched)
    # It is set here, and put back.
    monkeypatch.setattr(policy, "dummy_prompt", None)
    before = [p.detach().clone() for p in policy.parameters()]
    train_grpo.preflight(policy, examples, config)
    grpo = config.grpo
    assert seen == [[[grpo.max_new_tokens] * grpo.group_size] * grpo.micro_batch]
    assert all(p.grad is None for p in policy.parameters())
    assert all(map(torch.equal, before, policy.parameters()))
