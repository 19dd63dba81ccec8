"""What GRPO computes, one claim after another, in the order of train_grpo.py.

Claims are checked against numbers by hand, loops in float64, sums over all outcomes, and the plain
forward of the model. Shapes as there: B prompts, G completions of each, R = B * G rows, T tokens.
"""

import copy
import dataclasses
import math
import sys
import warnings
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import (
    LEARNING,
    ROOT,
    SMALL,
    START,
    all_tokens,
    distance,
    example,
    load,
    plain_logits,
    plain_logprobs,
    recorded,
    seeded,
    tolerance,
)
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import data
import train_grpo
from model import Rollout
from runtime import memory
from runtime.config import GRPOConfig, InputError
from runtime.metrics import GAP, update_metrics
from train_grpo import (
    UpdateStats,
    assign_advantages,
    group_advantages,
    grpo_loss,
    kl_terms,
    policy_loss,
    record_logprobs,
    sample_mini_batches,
    score,
    token_weights,
    trainable_groups,
    update,
)


def float64(numbers):
    return torch.tensor(numbers, dtype=torch.float64)


def mask_of(lengths):
    """(R, T): row r has lengths[r] tokens."""
    places = torch.arange(max(lengths))
    return places[None] < torch.tensor(lengths)[:, None]


def close(tensor, numbers):
    return torch.allclose(tensor.double(), float64(numbers), rtol=1e-6, atol=1e-9)


# ------------------------------------------------------------------------------- advantages

NORMS = ["group", "none", "batch"]


def test_an_advantage_is_the_reward_minus_the_mean_of_its_group():
    advantages = group_advantages(float64([[1, 0, 0, 1], [3, 5, 3, 5]]), "none")
    assert close(advantages, [[0.5, -0.5, -0.5, 0.5], [-1, 1, -1, 1]])


def test_norm_group_divides_by_the_std_of_the_group():
    """With n - 1, and with a little added so that a small std stays harmless."""
    rewards = float64([[1, 0, 0, 1], [3, 5, 3, 5]])
    first = 0.5 / (math.sqrt(4 * 0.25 / 3) + 1e-4)
    second = 1 / (math.sqrt(4 * 1 / 3) + 1e-4)
    expected = [[first, -first, -first, first], [-second, second, -second, second]]
    assert close(group_advantages(rewards, "group"), expected)


def test_norm_batch_divides_by_the_std_of_all_rewards():
    rewards = [[1, 0, 0, 1], [3, 5, 3, 5]]
    std = np.std(rewards, ddof=1) + 1e-4
    expected = np.array([[0.5, -0.5, -0.5, 0.5], [-1, 1, -1, 1]]) / std
    assert close(group_advantages(float64(rewards), "batch"), expected.tolist())


@pytest.mark.parametrize("norm", NORMS)
def test_equal_rewards_have_no_advantage(norm):
    advantages = group_advantages(float64([[0.2, 0.2], [0, 1]]), norm)
    assert not advantages[0].any()
    assert advantages[1].all()


@pytest.mark.parametrize("norm", NORMS)
def test_a_difference_by_rounding_is_no_advantage(norm):
    """Also beside a group whose rewards do differ."""
    rewards = torch.tensor([[0.3, 0.3 + 3e-8, 0.3, 0.3], [0.0, 1.0, 0.0, 1.0]])
    assert rewards[0, 0] != rewards[0, 1]
    assert not group_advantages(rewards, norm)[0].any()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("difference", [1e-5, 1e-2])
def test_a_small_difference_is_an_advantage(norm, difference):
    assert group_advantages(torch.tensor([[0.3, 0.3 + difference, 0.3, 0.3]]), norm).all()


def test_advantages_are_computed_in_float64():
    """In float32, the mean of numbers near 1,000 would be off by 1e-4."""
    rewards = torch.tensor([[1000.1, 1000.2, 1000.4, 1000.1, 1000.3]])
    exact = rewards.double() - rewards.double().mean()
    advantages = group_advantages(rewards, "none")
    assert advantages.dtype == torch.float32
    assert distance(advantages, exact) < 1e-7


# ------------------------------------------------------------------------------- ratio


def ratios(ratio, mask, importance):
    """What policy_loss makes of the ratios pi / pi_old of single tokens, (R, T)."""
    old_logp = torch.full(mask.shape, -3.0, dtype=torch.float64)
    logp = old_logp + float64(ratio).log()
    advantages = torch.ones(len(mask))
    _, got = policy_loss(logp, old_logp, advantages, mask, 0.2, 0.28, importance)
    return got


def test_the_ratio_is_the_new_probability_over_the_old():
    logp = float64([[0.6, 0.1]]).log()
    old_logp = float64([[0.3, 0.2]]).log()
    _, ratio = policy_loss(logp, old_logp, float64([1]), mask_of([2]), 0.2, 0.28)
    assert close(ratio, [[2, 0.5]])


def test_the_ratio_of_a_sequence_is_the_geometric_mean_of_its_tokens():
    """GSPO. 4 = sqrt(2 * 8), and 3 = cbrt(1 * 3 * 9)."""
    got = ratios([[2, 8, 99], [1, 3, 9]], mask_of([2, 3]), "sequence")
    assert close(got, [[4, 4, 4], [3, 3, 3]])


def test_padding_has_a_ratio_of_one():
    assert close(ratios([[2, 8, 99]], mask_of([2, 3])[:1], "token"), [[2, 8, 1]])


# ------------------------------------------------------------------------------- clipping


def surrogate(ratio, advantage):
    """The objective of one token, clipped to ratios from 0.8 to 1.28."""
    logp = float64([[ratio]]).log()
    old_logp = torch.zeros_like(logp)
    loss, _ = policy_loss(logp, old_logp, float64([advantage]), mask_of([1]), 0.2, 0.28)
    return -loss.item()


@pytest.mark.parametrize("ratio", [0.81, 1.0, 1.27])
@pytest.mark.parametrize("advantage", [-2.0, 2.0])
def test_inside_of_the_range_the_objective_is_ratio_times_advantage(ratio, advantage):
    assert surrogate(ratio, advantage) == pytest.approx(ratio * advantage)


def test_a_good_token_gains_nothing_above_the_range():
    assert surrogate(1.5, 2.0) == pytest.approx(1.28 * 2.0)


def test_a_bad_token_gains_nothing_below_the_range():
    assert surrogate(0.5, -2.0) == pytest.approx(0.8 * -2.0)


def test_a_good_token_below_the_range_is_not_clipped():
    assert surrogate(0.5, 2.0) == pytest.approx(0.5 * 2.0)


def test_a_bad_token_above_the_range_is_not_clipped():
    assert surrogate(1.5, -2.0) == pytest.approx(1.5 * -2.0)


def policy_gradient(ratio, advantage, importance="token"):
    """d loss / d logp of the tokens of one completion, by their ratios."""
    logp = float64([ratio]).log().requires_grad_()
    mask = mask_of([len(ratio)])
    old_logp = torch.zeros_like(logp)
    loss, _ = policy_loss(logp, old_logp, float64([advantage]), mask, 0.2, 0.28, importance)
    (gradient,) = torch.autograd.grad(loss.sum(), logp)
    return gradient[0]


def test_at_the_old_policy_the_gradient_is_that_of_plain_policy_gradient():
    """-A log pi, whose derivative by log pi is -A."""
    assert close(policy_gradient([1, 1], 3.0), [-3, -3])


def test_away_from_the_old_policy_the_gradient_is_weighted_by_the_ratio():
    assert close(policy_gradient([0.9, 1.1], 3.0), [-2.7, -3.3])


def test_a_good_token_is_silent_above_the_range_only():
    assert close(policy_gradient([1, 1.5, 0.5, 1.1], 1.0), [-1, 0, -0.5, -1.1])


def test_a_bad_token_is_silent_below_the_range_only():
    assert close(policy_gradient([1, 1.5, 0.5, 1.1], -1.0), [1, 1.5, 0, 1.1])


def test_with_sequence_ratios_all_tokens_are_pushed_alike():
    """1.2 = sqrt(0.9 * 1.6), although 1.6 alone would be clipped."""
    assert close(policy_gradient([0.9, 1.6], 1.0, "sequence"), [-1.2, -1.2])


# ------------------------------------------------------------------------------- KL


@pytest.fixture
def two_distributions():
    """Log-probabilities of 50 outcomes under a policy and a reference, in float64."""
    rng = np.random.default_rng(5)
    logp, ref_logp = (torch.tensor(rng.normal(size=50)).log_softmax(0) for _ in range(2))
    return logp, ref_logp


@pytest.mark.parametrize("name", ["k1", "k3"])
def test_k1_and_k3_are_unbiased(two_distributions, name):
    """Their mean over all outcomes is sum p log(p / q)."""
    logp, ref_logp = two_distributions
    p, q = logp.exp().numpy(), ref_logp.exp().numpy()
    exact = sum(p * np.log(p / q))
    mean = (logp.exp() * kl_terms(logp, ref_logp)[name]).sum()
    assert float(mean) == pytest.approx(exact)


def test_k1_has_no_gradient_on_average(two_distributions):
    logits, ref_logp = two_distributions
    logits.requires_grad_()
    logp = logits.log_softmax(0)
    sampled_mean = (logp.exp().detach() * kl_terms(logp, ref_logp)["k1"]).sum()
    (gradient,) = torch.autograd.grad(sampled_mean, logits)
    assert float(gradient.abs().max()) < 1e-12


def test_k2_is_half_the_square_of_the_log_ratio():
    # A probability that is e^2 times that of the reference, and one e^-2 times.
    assert close(kl_terms(float64([-1, -3]), float64([-3, -1]))["k2"], [2, 2])


def test_k3_is_never_negative(two_distributions):
    assert float(kl_terms(*two_distributions)["k3"].min()) >= 0


def test_every_estimate_is_zero_at_the_reference():
    logp = float64([-0.1, -5])
    for term in kl_terms(logp, logp).values():
        assert not term.any()


def test_k3_is_precise_near_the_reference():
    """d^2 / 2, where exp(d) - d - 1 in float32 would be rounding only."""
    near = kl_terms(torch.zeros(1), torch.tensor([-1e-4]))["k3"]
    assert float(near) == pytest.approx(5e-9, rel=1e-3)


# ------------------------------------------------------------------------------- aggregation

AGGREGATIONS = ["token", "sequence", "constant"]


def weights_by(loss_agg):
    """Of two completions of one and of three tokens, where five are allowed."""
    return token_weights(mask_of([1, 3]), loss_agg, n_tokens=4, n_sequences=2, max_new_tokens=5)


def test_the_loss_is_a_mean_over_all_tokens():
    w = 1 / 4
    assert close(weights_by("token"), [[w, 0, 0], [w, w, w]])


def test_the_loss_is_a_mean_over_the_means_of_sequences():
    assert close(weights_by("sequence"), [[1 / 2, 0, 0], [1 / 6, 1 / 6, 1 / 6]])


def test_the_loss_is_a_sum_over_a_constant_of_all_tokens_allowed():
    w = 1 / (2 * 5)
    assert close(weights_by("constant"), [[w, 0, 0], [w, w, w]])


@pytest.mark.parametrize("loss_agg", AGGREGATIONS)
def test_micro_batches_of_any_sizes_leave_every_weight_as_it_was(loss_agg):
    mask = mask_of([7, 2, 1, 5, 6, 1, 3, 7, 4])
    counts = int(mask.sum()), 9, 7
    whole = token_weights(mask, loss_agg, *counts)
    parts = [token_weights(part, loss_agg, *counts) for part in mask.split([2, 1, 6])]
    assert torch.equal(whole, torch.cat(parts))


# ------------------------------------------------------------------------------- the loss


def random_batch():
    """Log-probabilities new, old and of the reference, advantages and mask of six completions."""
    rng = np.random.default_rng(3)
    mask = mask_of([7, 2, 5, 1, 7, 4])
    logp, old_logp, ref_logp = (torch.tensor(rng.normal(-2, 0.6, mask.shape)) for _ in range(3))
    advantages = torch.tensor(rng.normal(size=len(mask)))
    return logp, old_logp, ref_logp, advantages, mask


def loss_by_loops(logp, old_logp, ref_logp, advantages, mask, grpo):
    """The definition, with k3."""
    sequences = []
    for i, a in enumerate(advantages.tolist()):
        n = int(mask[i].sum())
        log_ratios = (logp[i, :n] - old_logp[i, :n]).tolist()
        if grpo.importance == "sequence":
            log_ratios = [sum(log_ratios) / n] * n
        terms = []
        for t in range(n):
            ratio = math.exp(log_ratios[t])
            clipped = min(max(ratio, 1 - grpo.clip_low), 1 + grpo.clip_high)
            d = float(ref_logp[i, t] - logp[i, t])
            kl = math.exp(d) - d - 1
            terms.append(-min(ratio * a, clipped * a) + grpo.kl_coef * kl)
        sequences.append(terms)
    if grpo.loss_agg == "token":
        return np.mean(np.concatenate(sequences))
    if grpo.loss_agg == "sequence":
        return np.mean([np.mean(terms) for terms in sequences])
    return sum(map(sum, sequences)) / (len(mask) * grpo.max_new_tokens)


@pytest.mark.parametrize("importance", ["token", "sequence"])
@pytest.mark.parametrize("loss_agg", AGGREGATIONS)
def test_the_loss_equals_its_definition_in_loops(importance, loss_agg):
    grpo = GRPOConfig(importance=importance, loss_agg=loss_agg, kl_coef=0.1, max_new_tokens=9)
    batch = random_batch()
    mask = batch[-1]
    weights = token_weights(mask, loss_agg, int(mask.sum()), len(mask), grpo.max_new_tokens)
    loss, _ = grpo_loss(*batch, weights, grpo)
    assert float(loss) == pytest.approx(loss_by_loops(*batch, grpo), rel=1e-6)


def loss_of(ref_logp, **settings):
    """The loss of the random batch as a sum over its tokens, and what is logged of them."""
    logp, old_logp, _, advantages, mask = random_batch()
    grpo = GRPOConfig(**settings)
    return grpo_loss(logp, old_logp, ref_logp, advantages, mask, mask.double(), grpo)


@pytest.mark.parametrize("name", ["k1", "k2", "k3"])
def test_the_kl_to_the_reference_is_added_to_the_loss(name):
    logp, _, ref_logp, _, mask = random_batch()
    kl = kl_terms(logp, ref_logp)[name]
    without, _ = loss_of(None)
    loss, values = loss_of(ref_logp, kl_coef=0.5, kl_estimator=name)
    assert float(loss - without) == pytest.approx(0.5 * float(kl[mask].sum()))
    assert torch.equal(values["kl"], kl)


def test_all_estimates_of_the_kl_are_logged():
    logp, _, ref_logp, _, _ = random_batch()
    _, values = loss_of(ref_logp)
    for name, term in kl_terms(logp, ref_logp).items():
        assert torch.equal(values[f"kl/{name}"], term)


def test_without_a_reference_there_is_no_kl():
    _, values = loss_of(None)
    assert not [name for name in values if name.startswith("kl")]


@pytest.mark.parametrize(
    ("advantage", "low", "high"), [(1.0, [0, 0, 0, 0], [0, 0, 1, 0]), (-1.0, [0, 0, 0, 1], [0] * 4)]
)
def test_a_token_counts_as_clipped_where_it_is_silent(advantage, low, high):
    """Two ratios inside of the range, one above and one below it."""
    logp = float64([[0.9, 1.1, 1.5, 0.5]]).log()
    mask = mask_of([4])
    grpo = GRPOConfig(clip_low=0.2, clip_high=0.28)
    old_logp = torch.zeros_like(logp)
    _, values = grpo_loss(logp, old_logp, None, float64([advantage]), mask, mask, grpo)
    assert values["clip_ratio/low_mean"].tolist() == [low]
    assert values["clip_ratio/high_mean"].tolist() == [high]
    assert values["clip_ratio/region_mean"].int().tolist() == [np.add(low, high).tolist()]


def test_the_ratio_is_logged():
    logp, old_logp, _, _, mask = random_batch()
    _, values = loss_of(None)
    assert torch.allclose(values["ratio"][mask], (logp - old_logp).exp()[mask])


# ------------------------------------------------------------------------------- 1. rollout


class Sampler:
    """A policy that notes what it is asked to sample."""

    def __init__(self):
        self.calls = []

    def unsharded(self):
        return nullcontext()

    def sample(self, examples, *settings):
        self.calls.append((examples, settings))
        return [f"rollout of {e}" for e in examples]


def mini_batches(*settings, sampler=None):
    """Those of seven prompts, named 0 to 6."""
    return sample_mini_batches(sampler or Sampler(), list("0123456"), load(*settings), step=5)


def rollouts_of(names):
    return [f"rollout of {name}" for name in names]


def test_a_mini_batch_has_the_prompts_of_one_optimiser_step():
    expected = [rollouts_of("012"), rollouts_of("345"), rollouts_of("6")]
    assert mini_batches("grpo.mini_batch=3") == expected


def test_without_a_size_there_is_one_mini_batch():
    assert mini_batches("grpo.mini_batch=0", "grpo.prompts=7") == [rollouts_of("0123456")]


def test_each_process_samples_its_share_of_each_mini_batch(monkeypatch):
    """The second of two processes: every second prompt."""
    monkeypatch.setattr(train_grpo, "rank", lambda: 1)
    monkeypatch.setattr(train_grpo, "world_size", lambda: 2)
    assert mini_batches("grpo.mini_batch=4") == [rollouts_of("13"), rollouts_of("5")]


def test_no_more_prompts_are_sampled_together_than_allowed():
    sampler = Sampler()
    settings = ["grpo.mini_batch=5", "grpo.sample_batch=2"]
    assert mini_batches(*settings, sampler=sampler) == [rollouts_of("01234"), rollouts_of("56")]
    assert [len(examples) for examples, _ in sampler.calls] == [2, 2, 1, 2]


def test_samples_depend_on_seed_and_step():
    """Group size, length, temperature, and the stream of random numbers: (seed, step)."""
    sampler = Sampler()
    settings = ["grpo.group_size=3", "grpo.max_new_tokens=9", "grpo.temperature=0.8", "seed=4"]
    mini_batches(*settings, sampler=sampler)
    assert sampler.calls[0][1] == (3, 9, 0.8, (4, 5))


# ------------------------------------------------------------------------------- 2. rewards

BOX = "[0.00, 0.00, 1.00, 1.00]"


def group(task="report", texts=(), lengths=(), **values):
    """A rollout of a report, "clear lungs", or of one box, the whole image."""
    answer, boxes = ("clear lungs", ()) if task == "report" else (BOX, ((0, 0, 1, 1),))
    tokens = [torch.zeros(n, dtype=torch.long) for n in lengths]
    return Rollout(example(task, answer, boxes), None, tokens, list(texts), **values)


@pytest.fixture
def scored():
    """Groups of both tasks: a report is rewarded by its words, a box by its overlap, and each
    token costs a tenth."""
    config = load(
        "grpo.group_size=2",
        "rewards.report={gleu: 1, overlong: 0.5}",
        "rewards.grounding={soft_f1: 2, overlong: 1}",
        "rewards.overlong_start=0",
        "rewards.overlong_end=10",
    )
    groups = [
        group("grounding", [BOX, "no box"], [1, 2]),
        group("report", ["clear lungs", "fracture"], [3, 4]),
        group("grounding", ["no box", BOX], [5, 6]),
    ]
    score(groups, config)
    return groups


def test_every_group_gets_the_rewards_of_its_own_completions(scored):
    assert scored[0].rewards == pytest.approx([2 - 0.1, -0.2])
    assert scored[1].rewards == pytest.approx([1 - 0.15, -0.2])
    assert scored[2].rewards == pytest.approx([-0.5, 2 - 0.6])


def test_components_of_a_reward_are_kept_without_their_weights(scored):
    assert scored[1].reward_components == {
        "gleu": pytest.approx([1, 0]),
        "overlong": pytest.approx([-0.3, -0.4]),
    }
    assert scored[2].reward_components == {
        "soft_f1": pytest.approx([0, 1]),
        "overlong": pytest.approx([-0.5, -0.6]),
    }


def test_a_component_that_applies_to_no_completion_of_a_group_is_left_out(tmp_path):
    """One that applies to some is NaN for the others."""
    path = tmp_path / "mine.py"
    path.write_text(
        "def length(completions, **columns):\n    return [len(c) or None for c in completions]\n"
    )
    name = f"{path}:length"
    groups = [group(texts=["", ""], lengths=[1, 1]), group(texts=["ab", ""], lengths=[1, 1])]
    score(groups, load("grpo.group_size=2", f"rewards.report={{'{name}': 1}}"))
    assert groups[0].reward_components == {}
    assert groups[1].reward_components == {name: pytest.approx([2, math.nan], nan_ok=True)}


# ------------------------------------------------------------------------------- 3. advantages


def test_every_group_gets_its_advantages():
    groups = [group(rewards=[0.0, 1.0]), group(rewards=[6.0, 4.0])]
    assign_advantages(groups, load("grpo.adv_norm=none"))
    assert close(groups[0].advantages, [-0.5, 0.5])
    assert close(groups[1].advantages, [1, -1])


def test_norm_batch_is_over_the_groups_of_all_processes(monkeypatch):
    """Another process has the groups (0, 8) and (1, 1), and comes first."""

    def gather_rows(rows):
        return [[0.0, 8.0], [1.0, 1.0], *rows], slice(2, 2 + len(rows))

    monkeypatch.setattr(train_grpo, "gather_rows", gather_rows)
    groups = [group(rewards=[2.0, 4.0])]
    assign_advantages(groups, load("grpo.adv_norm=batch"))
    std = np.std([0, 8, 1, 1, 2, 4], ddof=1) + 1e-4
    assert close(groups[0].advantages, [-1 / std, 1 / std])


GDPO_PARTS = [
    {"mccs": [0.0, 1.0, 0.0, 1.0], "label_f1": [0.010, 0.020, 0.020, 0.010]},
    {"soft_f1": [0.3, 0.9, 0.4, 0.4]},
    {"mccs": [0.5, 0.6, 0.5, 0.5], "label_f1": [0.0, 0.0, 1.0, 0.0]},
]


def assign_by_parts(norm, parts, tasks=("report", "grounding", "report")):
    """The groups with their advantages, and the configuration."""
    config = load("grpo.normalize_parts=true", "grpo.group_size=4", f"grpo.adv_norm={norm}")
    groups = [group(task, reward_components=part) for task, part in zip(tasks, parts)]
    assign_advantages(groups, config)
    return groups, config.rewards


def parts_normalised(norm, name, places):
    return group_advantages(torch.tensor([GDPO_PARTS[i][name] for i in places]), norm)


@pytest.mark.parametrize("norm", ["group", "batch"])
def test_parts_are_normalised_one_by_one_and_then_summed(norm):
    """GDPO."""
    groups, rewards = assign_by_parts(norm, GDPO_PARTS)
    mccs = parts_normalised(norm, "mccs", [0, 2])
    label_f1 = parts_normalised(norm, "label_f1", [0, 2])
    expected = rewards.report["mccs"] * mccs + rewards.report["label_f1"] * label_f1
    assert torch.allclose(groups[0].advantages, expected[0])
    assert torch.allclose(groups[2].advantages, expected[1])


def test_the_other_task_does_not_widen_the_std_of_a_part():
    groups, rewards = assign_by_parts("batch", GDPO_PARTS)
    (soft_f1,) = parts_normalised("batch", "soft_f1", [1])
    assert torch.allclose(groups[1].advantages, rewards.grounding["soft_f1"] * soft_f1)


def test_a_part_that_does_not_apply_counts_as_average():
    """The mean of 1, 2 and 6 is 3."""
    groups, rewards = assign_by_parts("group", [{"mccs": [1.0, 2.0, math.nan, 6.0]}])
    expected = group_advantages(torch.tensor([[1.0, 2.0, 3.0, 6.0]]), "group")
    assert torch.allclose(groups[0].advantages, rewards.report["mccs"] * expected[0])


def test_all_processes_normalise_all_parts_in_one_order(monkeypatch):
    """They do it together, so each calls as often as the others, also without a group."""
    calls = []

    def gather_rows(rows):
        calls.append(len(rows))
        return rows, slice(len(rows))

    monkeypatch.setattr(train_grpo, "gather_rows", gather_rows)
    assign_by_parts("group", GDPO_PARTS)
    # label_f1, mccs, soft_f1
    assert calls == [2, 2, 1]
    calls.clear()
    assign_by_parts("group", [])
    assert calls == [0, 0, 0]


def with_advantages(*rows):
    return [group(advantages=torch.tensor(row)) for row in rows]


def test_groups_without_an_advantage_are_left_out_on_request():
    groups = with_advantages([0.0, 0.0], [-1.0, 1.0], [0.0, 0.1])
    assert trainable_groups(groups, GRPOConfig(drop_degenerate=True)) == groups[1:]


def test_otherwise_all_groups_are_trained_on():
    groups = with_advantages([0.0, 0.0], [-1.0, 1.0])
    assert trainable_groups(groups, GRPOConfig(drop_degenerate=False)) == groups


# ------------------------------------------------------------------------------- 4-7. updates

TEMPERATURE = 0.7
LENGTHS = [12, 7, 1, 4]
MANY = 10_000  # tokens: all groups in one micro-batch


def section(**changes):
    settings = {"micro_tokens": MANY, "max_new_tokens": 12, "temperature": TEMPERATURE}
    return GRPOConfig(**settings | changes)


@pytest.fixture(scope="module")
def sampled(policy, examples):
    """Four groups of random advantages, the second without any, with a reference nearby."""
    prompts = data.grpo_batch(examples, 0, load(*SMALL, "grpo.prompts=4", "data.report_share=0.5"))
    rollouts = policy.sample(prompts, len(LENGTHS), max(LENGTHS), TEMPERATURE, (0, 0))
    generator = seeded(2)
    for r in rollouts:
        r.tokens = [ids[:n] for ids, n in zip(r.tokens, LENGTHS)]
        logp = [row[:n] for row, n in zip(r.logprobs["sampled"], LENGTHS)]
        noise = [torch.randn(len(row), generator=generator).to(row.device) for row in logp]
        reference = [a + b / 5 for a, b in zip(logp, noise)]
        r.logprobs = {"sampled": logp, "reference": reference}
        r.advantages = torch.randn(len(LENGTHS), generator=generator)
    rollouts[1].advantages.zero_()
    return rollouts


@pytest.fixture
def rollouts(sampled):
    """With log-probs of their own, which updates add to."""
    return [dataclasses.replace(r, logprobs=dict(r.logprobs)) for r in sampled]


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
        return 0.25


def gradients(policy, rollouts, **changes):
    """The gradients of one update, which changes no weight, by name."""
    descent = Descent(policy)
    copies = [dataclasses.replace(r, logprobs=dict(r.logprobs)) for r in rollouts]
    update(policy, descent, copies, section(lr=0.0, **changes))
    return descent.gradients


def largest(gradients):
    return max(float(g.abs().max()) for g in gradients.values())


def differ(a, b):
    """How far the gradients a are from b, relative to the largest number of b."""
    assert a.keys() == b.keys()
    assert largest(b) > 1e-4
    return max(distance(a[name], b[name]) for name in a) / largest(b)


def size_of(rollouts):
    """Tokens of prompts and completions."""
    return sum(len(r.prompt) for r in rollouts) + count_tokens(rollouts)


def count_tokens(rollouts):
    return sum(map(len, all_tokens(rollouts)))


def summed(result, name):
    """Over the micro-batches of an update."""
    return sum(part[name] for part in result.sums)


@pytest.mark.gpu
def test_an_update_is_the_gradient_of_the_plain_objective(policy, rollouts):
    """-mean(A log p) + kl_coef * mean(k3) of plain rows through the model's own forward."""
    got = gradients(policy, rollouts, kl_coef=0.5, micro_tokens=size_of(rollouts[:3]))
    loss = 0.0
    for r in rollouts:
        for ids, ref_logp, a in zip(r.tokens, r.logprobs["reference"], r.advantages):
            logp = plain_logprobs(policy, r.prompt, ids, TEMPERATURE)
            d = ref_logp - logp
            kl = d.exp() - d - 1
            loss = loss - a.to(policy.device) * logp.sum() + 0.5 * kl.sum()
    loss = loss / count_tokens(rollouts)
    named = dict(policy.model.named_parameters())
    expected = torch.autograd.grad(loss, list(named.values()))
    assert differ(got, dict(zip(named, expected))) < tolerance("gradients", policy.device)


def test_micro_batches_take_prompts_in_order_until_the_budget_is_full(policy):
    sizes = [5, 5, 30, 1, 9, 10, 2]
    rollouts = [SimpleNamespace(prompt=[0] * (size - 1), lengths=[1]) for size in sizes]
    batches = policy.micro_batches(rollouts, 10)
    assert [[len(r.prompt) + 1 for r in batch] for batch in batches] == [
        [5, 5],
        [30],
        [1, 9],
        [10],
        [2],
    ]
    assert policy.micro_batches(rollouts, 1) == [[r] for r in rollouts]
    assert policy.micro_batches([], 10) == []


def test_plain_rows_count_each_with_its_own_prompt_and_padding(policy, rollouts, monkeypatch):
    """As many tokens as the model is given."""
    monkeypatch.setattr(policy, "shared", False)
    given = []
    run = policy.run

    def counting(prompts, tokens, **options):
        given.append(tokens["input_ids"].numel())
        return run(prompts, tokens, **options)

    monkeypatch.setattr(policy, "run", counting)
    prompts = [r.prompt for r in rollouts]
    policy.logprobs(prompts, [r.tokens for r in rollouts], 1.0)
    lengths = [r.lengths for r in rollouts]
    assert [policy.tokens_to_score(prompts, lengths)] == given
    one = policy.tokens_to_score(prompts[:1], lengths[:1])
    assert len(policy.micro_batches(rollouts, one)) == len(rollouts)


@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(3))
def test_micro_tokens_do_not_change_the_gradient(policy, rollouts, seed):
    """Groups of random lengths, in random micro-batches and in a single one."""
    rng = np.random.default_rng(seed)
    for r in rollouts:
        lengths = rng.integers(1, [n + 1 for n in LENGTHS])
        r.tokens = [ids[:n] for ids, n in zip(r.tokens, lengths)]
        for name, rows in r.logprobs.items():
            r.logprobs[name] = [row[:n] for row, n in zip(rows, lengths)]
    # From one group in a micro-batch to all but one.
    micro_tokens = int(rng.integers(1, size_of(rollouts[:-1])))
    assert len(policy.micro_batches(rollouts, micro_tokens)) > 1
    parts = gradients(policy, rollouts, micro_tokens=micro_tokens, kl_coef=0.1)
    whole = gradients(policy, rollouts, micro_tokens=MANY, kl_coef=0.1)
    assert differ(parts, whole) < tolerance("gradients", policy.device)


@pytest.mark.gpu
@pytest.mark.parametrize("loss_agg", AGGREGATIONS)
def test_the_divisor_of_the_loss_counts_all_processes(policy, rollouts, monkeypatch, loss_agg):
    """Two with the same groups: each gives half of the gradient."""
    alone = gradients(policy, rollouts[:1], loss_agg=loss_agg)
    monkeypatch.setattr(train_grpo, "gather_lists", lambda items: items + items)
    half = gradients(policy, rollouts[:1], loss_agg=loss_agg)
    doubled = {name: 2 * gradient for name, gradient in half.items()}
    assert differ(doubled, alone) < tolerance("gradients", policy.device)


@pytest.mark.gpu
@pytest.mark.parametrize("loss_agg", ["token", "sequence"])
def test_a_dropped_group_is_left_out_of_the_divisor(policy, rollouts, loss_agg):
    without = [rollouts[0], *rollouts[2:]]
    expected = gradients(policy, without, loss_agg=loss_agg)
    got = gradients(policy, rollouts, loss_agg=loss_agg, drop_degenerate=True)
    assert differ(got, expected) < tolerance("gradients", policy.device)


@pytest.mark.gpu
def test_a_group_without_advantages_counts_unless_it_is_dropped(policy, rollouts):
    dropped = gradients(policy, rollouts, drop_degenerate=True)
    kept = gradients(policy, rollouts, drop_degenerate=False)
    assert differ(kept, dropped) > 0.01


@pytest.mark.gpu
def test_a_constant_divisor_counts_dropped_groups(policy, rollouts):
    settings = {"loss_agg": "constant", "kl_coef": 0.0}
    kept = gradients(policy, rollouts, **settings)
    dropped = gradients(policy, rollouts, drop_degenerate=True, **settings)
    assert differ(dropped, kept) < tolerance("gradients", policy.device)


@pytest.mark.gpu
def test_an_update_without_a_trainable_group_changes_nothing(policy, rollouts):
    descent = Descent(policy)
    result = update(policy, descent, rollouts[1:2], section(lr=1.0, drop_degenerate=True))
    assert result == UpdateStats([], 0.0)
    assert not descent.gradients


@pytest.fixture
def moved(policy):
    """A copy of the policy, to be trained."""
    return copy.deepcopy(policy)


@pytest.mark.gpu
def test_until_its_first_update_the_policy_is_the_old_one(policy, moved, rollouts):
    record_logprobs(policy, rollouts, "before", section(micro_tokens=size_of(rollouts[:3])))
    result = update(moved, Descent(moved), rollouts, section(lr=0.1))
    limit = tolerance("log-probs", policy.device)
    assert distance(recorded(rollouts, "old"), recorded(rollouts, "before")) < limit
    assert summed(result, "ratio") == pytest.approx(count_tokens(rollouts), rel=limit)


@pytest.mark.gpu
def test_later_updates_keep_the_old_log_probs(moved, rollouts):
    update(moved, Descent(moved), rollouts, section(lr=0.1))
    old = recorded(rollouts, "old")
    update(moved, Descent(moved), rollouts, section(lr=0.1))
    assert torch.equal(recorded(rollouts, "old"), old)


@pytest.mark.gpu
def test_later_updates_see_how_far_the_policy_has_moved(policy, moved, rollouts):
    """From the policy that sampled, which is also the reference here."""
    for r in rollouts:
        del r.logprobs["reference"]
    record_logprobs(policy, rollouts, "reference", section())
    first = update(moved, Descent(moved), rollouts, section(lr=0.1))
    second = update(moved, Descent(moved), rollouts, section(lr=0.1))
    n_tokens = count_tokens(rollouts)
    assert abs(summed(first, "kl/k1")) < 1e-3
    assert summed(second, "kl/k3") > 1e-6
    assert abs(summed(second, "ratio") / n_tokens - 1) > 1e-4


@pytest.mark.gpu
def test_recorded_log_probs_are_those_of_plain_rows(policy, rollouts):
    record_logprobs(policy, rollouts, "here", section(micro_tokens=size_of(rollouts[:3])))
    for r in rollouts:
        for logp, ids in zip(r.logprobs["here"], r.tokens):
            plain = plain_logprobs(policy, r.prompt, ids, TEMPERATURE)
            assert distance(logp, plain) < tolerance("library", policy.device)
            assert not logp.requires_grad


@pytest.mark.gpu
def test_no_log_probs_are_recorded_of_dropped_groups(policy, rollouts):
    record_logprobs(policy, rollouts, "here", section(drop_degenerate=True))
    assert ["here" in r.logprobs for r in rollouts] == [True, False, True, True]


@pytest.mark.gpu
def test_what_an_update_logs_are_sums_over_its_tokens(policy, rollouts):
    """At ratio 1, the surrogate of every token is its advantage."""
    grpo = section(lr=0.0, kl_coef=0.0, micro_tokens=size_of(rollouts[:3]))
    result = update(policy, Descent(policy), rollouts, grpo)
    n_tokens = count_tokens(rollouts)
    entropy = surrogates = 0.0
    for r in rollouts:
        for ids, a in zip(r.tokens, r.advantages.tolist()):
            logits = plain_logits(policy, r.prompt, ids).detach() / TEMPERATURE
            entropy += float(torch.special.entr(logits.softmax(-1)).sum())
            surrogates += a * len(ids)
    assert len(result.sums) == 2
    assert summed(result, "tokens") == n_tokens
    assert summed(result, "entropy") == pytest.approx(entropy, rel=1e-3)
    assert summed(result, "loss") == pytest.approx(-surrogates / n_tokens, rel=1e-3)
    assert result.grad_norm == 0.25


@pytest.mark.gpu
def test_the_gap_to_sampling_is_taken_for_the_weights_that_sampled(moved, rollouts):
    """In the second epoch the policy is far from them, and the sampler is as right as before."""
    grpo = section(lr=1.0, kl_coef=0.0)
    descent = Descent(moved)
    update(moved, descent, rollouts, grpo)
    metrics = update_metrics([update(moved, descent, rollouts, grpo)])
    assert abs(metrics["ratio"] - 1) > 0.01
    assert metrics[f"{GAP}/max"] < tolerance("library", moved.device)


@pytest.mark.gpu
def test_the_gap_to_sampling_is_the_largest_and_the_mean_difference(policy, rollouts):
    """One number of 24 tokens is wrong by a half."""
    wrong = rollouts[0].logprobs["sampled"][0].clone()
    wrong[0] -= 0.5
    rollouts[0].logprobs["sampled"] = [wrong, *rollouts[0].logprobs["sampled"][1:]]
    metrics = update_metrics([update(policy, Descent(policy), rollouts[:1], section(lr=0.0))])
    limit = tolerance("library", policy.device)
    assert metrics[f"{GAP}/max"] == pytest.approx(0.5, abs=limit)
    assert metrics[f"{GAP}/mean"] == pytest.approx(0.5 / sum(LENGTHS), abs=limit)


# ------------------------------------------------------------------------------- no waiting

# What waits for a GPU to know a number or a size.
WAITING = {"item", "tolist", "__bool__", "__int__", "__float__", "__index__", "nonzero", "cpu"}
# These work on sizes, which are known on the CPU.
ON_CPU = {("shared_prefix.py", name) for name in ("__init__", "row_block", "shared_hidden")}
ON_CPU.add(("model.py", "logprobs"))


def our_line(frame):
    """FILE:LINE if the first caller outside of torch is code of this project, else None."""
    while "/torch/" in frame.f_code.co_filename or frame.f_code.co_filename == __file__:
        frame = frame.f_back
    path = Path(frame.f_code.co_filename)
    ours = ROOT in path.parents and (path.name, frame.f_code.co_name) not in ON_CPU
    return f"{path.name}:{frame.f_lineno}" if ours else None


class WaitsInBackward(TorchDispatchMode):
    """The same for a backward, which hides method calls.

    Indexing by a mask is left out: the gradient of what transformers does with images has it.
    """

    def __init__(self, lines):
        super().__init__()
        self.lines = lines

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket.__name__ in ("_local_scalar_dense", "masked_scatter_backward"):
            self.lines.add(our_line(sys._getframe(1)))
        return function(*args, **(kwargs or {}))


class Waits(TorchFunctionMode):
    """The lines of this project that would wait for a GPU."""

    def __init__(self):
        super().__init__()
        self.lines = set()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        is_read = function.__name__ == "__getitem__"
        by_mask = is_read and getattr(args[1], "dtype", None) == torch.bool
        if by_mask or function.__name__ in WAITING:
            self.lines.add(our_line(sys._getframe(1)))
        return function(*args, **(kwargs or {}))


def test_nothing_waits_for_the_gpu_within_a_micro_batch(policy, rollouts, monkeypatch):
    """With a frozen tower: gradients of what transformers does with images do wait."""
    waits = Waits()
    # Once all micro-batches are done, numbers may be read.
    monkeypatch.setattr(train_grpo, "tree_map", lambda function, sums: sums)
    frozen_policy = copy.deepcopy(policy)
    frozen_policy.freeze(["vision", "projector"])
    for r in rollouts:
        frozen_policy.remember_images([r.prompt])
    grpo = section(lr=0.0, kl_coef=0.1, micro_tokens=1)
    with waits, WaitsInBackward(waits.lines):
        result = update(frozen_policy, Descent(frozen_policy), rollouts, grpo)
    assert len(result.sums) == len(rollouts)
    assert waits.lines - {None} == set()


@pytest.mark.gpu
def test_on_a_gpu_nothing_waits_within_a_micro_batch(policy, rollouts, device):
    """The same by CUDA's own check. What transformers does with images is not ours."""
    if device.type == "cpu":
        pytest.skip("its twin above runs on the CPU")
    lines = set()
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        completions = [r.tokens for r in rollouts]
        logp, _, _ = policy.logprobs([r.prompt for r in rollouts], completions)
        logp.sum().backward()
    torch.cuda.set_sync_debug_mode("default")
    policy.model.zero_grad()
    for warning in caught:
        path = Path(warning.filename)
        if ROOT in path.parents and "synchronizing" in str(warning.message):
            lines.add(f"{path.name}:{warning.lineno}")
    assert lines == set()


# ------------------------------------------------------------------------------- metrics


def test_metrics_are_means_over_the_tokens_of_all_updates():
    """Loss and gradient norm are means over updates, and the largest gap is the largest."""
    gap = f"{GAP}/max"
    first = UpdateStats(
        [
            {"tokens": 2, "entropy": 3.0, "loss": 0.1, gap: 0.5},
            {"tokens": 1, "entropy": 1.0, "loss": 0.2, gap: 0.7},
        ],
        1.0,
    )
    second = UpdateStats([{"tokens": 5, "entropy": 0.0, "loss": 0.5, gap: 0.6}], 2.0)
    metrics = update_metrics([first, second])
    assert metrics["entropy"] == pytest.approx(4 / 8)
    assert metrics["loss"] == pytest.approx(0.8 / 2)
    assert metrics["grad_norm"] == 1.5
    assert metrics[gap] == 0.7
    assert "tokens" not in metrics


# ------------------------------------------------------------------------------- before the loop


@pytest.mark.gpu
def test_preflight_runs_the_largest_update_and_leaves_nothing(policy, examples, monkeypatch):
    longest = max(len(policy.encode(e)) for e in examples[: train_grpo.PROMPTS_TO_TRY])
    three = 3 * (longest + 5 * 20) + 1
    settings = f"grpo.micro_tokens={three}", "grpo.group_size=5", "grpo.max_new_tokens=20"
    config = load(*SMALL, *settings)
    seen = []
    logprobs = policy.logprobs

    def watched(prompts, completions, *more):
        seen.append([list(map(len, group)) for group in completions])
        return logprobs(prompts, completions, *more)

    monkeypatch.setattr(policy, "logprobs", watched)
    # It is set here, and put back.
    monkeypatch.setattr(policy, "dummy_prompt", None)
    before = [p.detach().clone() for p in policy.parameters()]
    assert train_grpo.preflight(policy, examples, config, {"step": 0}).grpo.micro_tokens == three
    assert seen == [[[20] * 5] * 3]
    assert all(p.grad is None for p in policy.parameters())
    assert all(map(torch.equal, before, policy.parameters()))


@pytest.mark.parametrize(
    ("key", "state", "expected"), [(700, 500, 700), (0, 500, 500), (0, None, 4096)]
)
def test_micro_tokens_are_the_setting_or_those_of_the_run_or_chosen(
    policy, examples, monkeypatch, key, state, expected
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(policy, "dummy_prompt", None)
    for name in ("try_evaluation", "try_update"):
        module = train_grpo if name == "try_update" else train_grpo.evaluation
        monkeypatch.setattr(module, name, lambda *args: None)
    config = load(*SMALL, f"grpo.micro_tokens={key}")
    state = {"step": 1, "micro_tokens": state} if state else {"step": 0}
    assert train_grpo.preflight(policy, examples, config, state).grpo.micro_tokens == expected


def test_on_a_gpu_the_free_memory_chooses_micro_tokens(monkeypatch):
    """The optimizer takes 60 of 300 free bytes, and half of the others is for activations, of which
    100 tokens take 24 bytes."""
    allocated = iter([100, 130])
    counters = {
        "memory_allocated": lambda: next(allocated),
        "reset_peak_memory_stats": lambda: None,
        "max_memory_allocated": lambda: 130 + 24,
        "empty_cache": lambda: None,
        "mem_get_info": lambda: (300, 1000),
        "is_available": lambda: True,
    }
    for name, function in counters.items():
        monkeypatch.setattr(torch.cuda, name, function)
    monkeypatch.setattr(memory, "gather_objects", lambda value: [value + 1, value])
    turns = iter("12")
    assert memory.tokens_that_fit(lambda: next(turns), 100) == 100 * 5
    assert not list(turns)


@pytest.mark.parametrize("micro_tokens", [0, 50])
def test_a_micro_batch_that_does_not_fit_is_one_line(policy, examples, monkeypatch, micro_tokens):
    """Also where a single prompt is too much."""

    def out_of_memory(*args):
        raise torch.OutOfMemoryError("CUDA out of memory.\nmore")

    monkeypatch.setattr(train_grpo, "try_update", out_of_memory)
    monkeypatch.setattr(train_grpo, "tokens_that_fit", lambda work, tokens: work())
    monkeypatch.setattr(policy, "dummy_prompt", None)
    config = load(*SMALL, f"grpo.micro_tokens={micro_tokens}")
    with pytest.raises(InputError) as error:
        train_grpo.preflight(policy, examples, config, {"step": 0})
    assert f"(grpo.micro_tokens={micro_tokens}, at least one group of" in str(error.value)
    assert "lower grpo.micro_tokens, grpo.group_size, " in str(error.value)
    assert "\n" not in str(error.value)


def test_a_run_keeps_its_micro_tokens(tmp_path):
    """Resumed with the same setting, 0, it goes on with those that it began with."""
    stop = SimpleNamespace(requested=lambda: False)
    short = *LEARNING, f"out={tmp_path}", "grpo.micro_tokens=0", "grpo.max_new_tokens=4"

    def state_after(steps):
        train_grpo.train(load(*short, f"grpo.steps={steps}"), tmp_path, str(START), stop)
        return torch.load(tmp_path / "last" / "training_state.pt", weights_only=True)

    state = state_after(1)
    if not torch.cuda.is_available():
        assert state["micro_tokens"] == memory.CPU_TOKENS
    torch.save(state | {"micro_tokens": 50}, tmp_path / "last" / "training_state.pt")
    assert state_after(2)["micro_tokens"] == 50


@pytest.mark.gpu
def test_what_the_memory_chooses(policy, examples):
    """On a GPU what fits, on a CPU a constant."""
    prompts = [policy.encode(examples[0])]
    work = partial(train_grpo.try_update, policy, prompts, section())
    assert memory.tokens_that_fit(work, 100) >= 4096
    policy.model.zero_grad()
