"""The GRPO mathematics against hand-computed numbers, exact enumeration and brute-force loops in float64."""

import copy
import math

import numpy as np
import pytest
import torch

import data
import model
import train_grpo
from conftest import ROOT
from train_grpo import grpo_loss, group_advantages, kl_terms, policy_loss, token_weights


def ragged(rng, rows=6, length=7):
    lengths = torch.tensor(rng.integers(1, length + 1, rows))
    lengths[0] = length
    return torch.arange(length)[None] < lengths[:, None]


def test_advantages_by_hand():
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.5, 0.5, 0.5, 0.5]])
    std = math.sqrt(4 * 0.25 / 3)  # of the first group, with n - 1
    expected = 0.5 / (std + 1e-4)
    assert torch.allclose(
        group_advantages(rewards, "group"),
        torch.tensor([[expected, -expected, -expected, expected], [0.0] * 4]),
    )
    assert torch.equal(
        group_advantages(rewards, "none"), torch.tensor([[0.5, -0.5, -0.5, 0.5], [0.0] * 4])
    )
    batch_std = float(np.std(rewards.numpy(), ddof=1))
    assert torch.allclose(
        group_advantages(rewards, "batch")[0],
        torch.tensor([0.5, -0.5, -0.5, 0.5]) / (batch_std + 1e-4),
    )


@pytest.mark.parametrize("norm", ["group", "none", "batch"])
def test_advantages_of_degenerate_groups(norm):
    assert not group_advantages(torch.tensor([[0.7], [0.1]]), norm).any()  # G = 1: no NaN
    nearly = torch.tensor([[0.3, 0.3 + 3e-8, 0.3, 0.3]])  # rounding is no difference
    assert not group_advantages(nearly, norm).any()
    assert group_advantages(torch.tensor([[0.3, 0.31, 0.3, 0.3]]), norm).any()


@pytest.mark.parametrize("importance", ["token", "sequence"])
@pytest.mark.parametrize("agg", ["token", "sequence", "constant"])
def test_loss_equals_loops(importance, agg):
    rng = np.random.default_rng([3, importance == "token", len(agg)])
    mask = ragged(rng)
    logp, old, ref = (torch.tensor(rng.normal(-2, 0.6, mask.shape)) for _ in range(3))
    advantages = torch.tensor(rng.normal(size=len(mask)))
    grpo = data.GRPOConfig(
        importance=importance, loss_agg=agg, kl_coef=0.1, kl_estimator="k3", max_new_tokens=9
    )
    weights = token_weights(mask, agg, int(mask.sum()), len(mask), grpo.max_new_tokens)
    loss, values = grpo_loss(logp, old, ref, advantages, mask, weights, grpo)
    sums = {name: float(value[mask].sum()) for name, value in values.items()}

    per_sequence, clipped_low = [], 0
    for i in range(len(mask)):
        n = int(mask[i].sum())
        ratios = [math.exp(logp[i, t] - old[i, t]) for t in range(n)]
        if importance == "sequence":
            ratios = [math.exp(sum(float(logp[i, t] - old[i, t]) for t in range(n)) / n)] * n
        terms = []
        for t in range(n):
            a = float(advantages[i])
            surrogate = min(ratios[t] * a, min(max(ratios[t], 0.8), 1.28) * a)
            d = float(ref[i, t] - logp[i, t])
            terms.append(-surrogate + 0.1 * (math.exp(d) - d - 1))
            clipped_low += ratios[t] < 0.8 and a < 0
        per_sequence.append(terms)
    expected = {
        "token": np.mean([x for terms in per_sequence for x in terms]),
        "sequence": np.mean([np.mean(terms) for terms in per_sequence]),
        "constant": sum(sum(terms) for terms in per_sequence) / (len(mask) * 9),
    }[agg]
    assert float(loss) == pytest.approx(expected, rel=1e-6)
    assert sums["clip_ratio/low_mean"] == clipped_low and (clipped_low or importance == "sequence")


def test_gradient_of_the_clipped_objective():
    """Unclipped tokens push by -A r / N; a token is silent where clipping binds in the direction it would be pushed."""
    old = torch.zeros(1, 4, dtype=torch.float64)
    logp = torch.log(torch.tensor([[1.0, 1.5, 0.5, 1.1]], dtype=torch.float64)).requires_grad_()
    mask = torch.ones(1, 4, dtype=torch.bool)
    for sign in (1.0, -1.0):
        loss, _ = policy_loss(logp, old, torch.tensor([sign], dtype=torch.float64), mask, 0.2, 0.28)
        (gradient,) = torch.autograd.grad(loss.sum(), logp)
        silent = [0, 1, 0, 0] if sign > 0 else [0, 0, 1, 0]
        expected = [[-sign * r * (1 - s) for r, s in zip([1.0, 1.5, 0.5, 1.1], silent)]]
        assert torch.allclose(gradient, torch.tensor(expected, dtype=torch.float64))


def test_kl_estimators_against_the_exact_divergence():
    rng = np.random.default_rng(5)
    p, q = (torch.tensor(rng.normal(size=50)).log_softmax(0) for _ in range(2))
    exact = float((p.exp() * (p - q)).sum())
    terms = kl_terms(p, q)  # every outcome once
    assert float((p.exp() * terms["k1"]).sum()) == pytest.approx(exact)
    assert float((p.exp() * terms["k3"]).sum()) == pytest.approx(exact)
    assert float(terms["k3"].min()) >= 0 and torch.allclose(terms["k2"], (p - q) ** 2 / 2)
    tiny = kl_terms(torch.zeros(1), torch.full((1,), -1e-4))["k3"]  # expm1: no cancellation
    assert float(tiny) == pytest.approx(5e-9, rel=1e-3)


@pytest.mark.parametrize("agg", ["token", "sequence", "constant"])
def test_micro_batches_add_up(agg):
    """Splitting a batch into micro-batches of any sizes leaves every token's weight as it was."""
    mask = ragged(np.random.default_rng(8), rows=9)
    whole = token_weights(mask, agg, int(mask.sum()), 9, 7)
    parts = [token_weights(m, agg, int(mask.sum()), 9, 7) for m in mask.split([2, 1, 6])]
    assert torch.equal(whole, torch.cat(parts))


@pytest.fixture(scope="module")
def rollouts(policy, config, examples):
    grpo = config.grpo
    chosen = data.batch(examples, 4, 0, 0, "grpo", 0.5)
    rollouts = policy.sample(chosen, grpo.group_size, 12, 1.0, (0, 0))
    generator = torch.Generator().manual_seed(2)
    for r in rollouts:
        r.rewards = torch.rand(grpo.group_size, generator=generator)
    rollouts[1].rewards[:] = 0.5  # a degenerate group
    train_grpo.assign_advantages(rollouts, config)
    return rollouts


def gradients(policy, rollouts, **changes):
    """Without an optimiser, the gradients stay in place to be looked at."""
    grpo = data.GRPOConfig(
        **{"group_size": 8, "micro_batch": 4, "grad_clip": 1e9, "max_new_tokens": 12, **changes}
    )
    policy.model.zero_grad()
    sums, norm = train_grpo.update(policy, [], rollouts, 0.0, grpo)
    return [p.grad.clone() for p in policy.parameters() if p.grad is not None], sums, norm


def test_update_equals_the_plain_objective(policy, rollouts):
    """The whole update path against -mean(A log p) through unshared rows and the model's own full logits."""
    got, sums, _ = gradients(policy, rollouts, kl_coef=0.0, micro_batch=3)
    policy.model.zero_grad()
    n_tokens, objective = sum(len(t) for r in rollouts for t in r.tokens), 0.0
    for r in rollouts:
        for ids, a in zip(r.tokens, r.advantages):
            full = torch.cat([r.prompt["input_ids"], ids[None]], 1)
            types = torch.cat([r.prompt["mm_token_type_ids"], torch.zeros_like(ids[None])], 1)
            out = policy.model(
                input_ids=full,
                mm_token_type_ids=types,
                attention_mask=torch.ones_like(full),
                pixel_values=r.prompt["pixel_values"],
                image_grid_thw=r.prompt["image_grid_thw"],
            )
            logits = out.logits[0, -len(ids) - 1 : -1].index_fill(1, policy.banned, -torch.inf)
            objective = (
                objective
                - (a * logits.log_softmax(-1)[torch.arange(len(ids)), ids]).sum() / n_tokens
            )
    objective.backward()
    expected = [p.grad for p in policy.parameters() if p.grad is not None]
    scale = max(float(g.abs().max()) for g in expected)
    assert scale > 1e-4 and len(got) == len(expected)
    assert max(float((a - b).abs().max()) for a, b in zip(got, expected)) < 1e-5 * scale
    assert sums["tokens"] == n_tokens and sums["gap_max"] < 1e-4


def test_micro_batch_size_does_not_change_the_gradient(policy, rollouts):
    one, _, _ = gradients(policy, rollouts, micro_batch=1)
    four, _, _ = gradients(policy, rollouts, micro_batch=4)
    assert max(float((a - b).abs().max()) for a, b in zip(one, four)) < 1e-6


def test_drop_degenerate_leaves_the_group_out_of_the_denominator(policy, rollouts):
    kept, sums, _ = gradients(policy, rollouts, drop_degenerate=True)
    without, _, _ = gradients(
        policy, [r for i, r in enumerate(rollouts) if i != 1], drop_degenerate=False
    )
    assert sums["tokens"] == sum(len(t) for i, r in enumerate(rollouts) if i != 1 for t in r.tokens)
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(kept, without))


def test_several_updates_use_fixed_old_logprobs(policy, config, rollouts):
    """After the policy has moved, ratios are taken against the recorded log-probs, and the reference is untouched."""
    moved = copy.deepcopy(policy)
    copies = [copy.copy(r) for r in rollouts]
    grpo = data.GRPOConfig(group_size=8, micro_batch=2, max_new_tokens=12)
    before = train_grpo.fixed_logprobs(policy, copies, grpo)
    for r, old in zip(copies, before):
        r.old_logprobs, r.ref_logprobs = None, old
        assert [len(x) for x in old] == [len(t) for t in r.tokens]
    first, _ = train_grpo.update(
        moved, [torch.optim.SGD(moved.parameters(), 0.1)], copies, 0.1, grpo
    )
    recorded = [old for r in copies for old in r.old_logprobs]
    assert all(
        torch.allclose(a, b, atol=1e-5) for a, b in zip(recorded, sum(before, []), strict=True)
    )
    second, _ = train_grpo.update(
        moved, [torch.optim.SGD(moved.parameters(), 0.1)], copies, 0.1, grpo
    )
    assert all(a is b for a, b in zip(recorded, [old for r in copies for old in r.old_logprobs]))
    assert first["ratio"] == pytest.approx(first["tokens"], rel=1e-5) and abs(first["kl/k1"]) < 1e-3
    assert abs(second["ratio"] / second["tokens"] - 1) > 1e-4 and second["kl/k3"] > 1e-6


@pytest.mark.parametrize("norm", ["group", "none", "batch"])
def test_parts_are_normalised_one_by_one(config, norm):
    """Each part over the groups of its own task: the other task's groups do not widen the std of the batch."""
    changed = copy.deepcopy(config)
    changed.grpo.normalize_parts, changed.grpo.group_size, changed.grpo.adv_norm = True, 4, norm
    parts = [
        {
            "mccs": torch.tensor([0.0, 1.0, 0.0, 1.0]),
            "label_f1": torch.tensor([0.010, 0.020, 0.020, 0.010]),
        },
        {"soft_f1": torch.tensor([0.3, 0.9, 0.4, 0.4])},
        {
            "mccs": torch.tensor([0.5, 0.6, 0.5, 0.5]),
            "label_f1": torch.tensor([0.0, 0.0, 1.0, 0.0]),
        },
    ]
    rollouts = [
        model.Rollout(data.Example("a", task, (), "", ""), {}, [], [], [], [], part)
        for task, part in zip(("report", "grounding", "report"), parts)
    ]
    train_grpo.assign_advantages(rollouts, changed)
    report, grounding = config.rewards.report, config.rewards.grounding
    mccs, f1 = (
        group_advantages(torch.stack([parts[0][name], parts[2][name]]), norm)
        for name in ("mccs", "label_f1")
    )
    expected = report["mccs"] * mccs + report["label_f1"] * f1
    assert torch.allclose(torch.stack([rollouts[0].advantages, rollouts[2].advantages]), expected)
    assert torch.allclose(
        rollouts[1].advantages,
        grounding["soft_f1"] * group_advantages(parts[1]["soft_f1"][None], norm)[0],
    )


def test_steps_without_finite_gradients_are_counted_in_a_row(config):
    limited = data.load_config(ROOT / "config.yaml", ["model.max_bad_steps=3"])
    assert (
        model.bad_steps(0, [1.0, math.nan, math.inf], limited, "here") == 2
        and model.bad_steps(2, [1.0, math.nan], limited, "here") == 1
    )
    with pytest.raises(data.InputError, match="here: 3 optimiser steps"):
        model.bad_steps(2, [math.nan], limited, "here")


def test_preflight_runs_the_largest_update_and_leaves_nothing(
    policy, examples, config, monkeypatch
):
    seen, logprobs = [], policy.logprobs

    def watched(prompts, completions, *more):
        seen.append((len(prompts), [len(t) for g in completions for t in g]))
        return logprobs(prompts, completions, *more)

    monkeypatch.setattr(policy, "logprobs", watched)
    before = [p.detach().clone() for p in policy.parameters()]
    train_grpo.preflight(policy, examples, config)
    g = config.grpo
    assert seen == [(g.micro_batch, [g.max_new_tokens] * g.micro_batch * g.group_size)] and all(
        p.grad is None for p in policy.parameters()
    )
    assert all(torch.equal(a, b) for a, b in zip(before, policy.parameters()))
