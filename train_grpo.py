"""Group relative policy optimisation (GRPO) for chest X-ray reports and grounding, by hand.

  python train_grpo.py config.yaml [key=value ...]
  torchrun --nproc_per_node 8 train_grpo.py config.yaml [key=value ...]

The parts of a step, numbered as in the code, and the settings of each (section `grpo`; of several
values, the first is the default of runtime/config.py, which config.yaml may change):

  1. Rollout      G completions per prompt, full softmax       group_size, temperature
  2. Rewards      weighted components of each task             rewards.report, rewards.grounding
  3. Advantages   reward minus the group's mean, over a std    adv_norm: group | none | batch
                  every component by itself (GDPO)             normalize_parts: false | true
                  without groups of equal rewards              drop_degenerate: false | true
  4. Ratio        pi / pi_old per token or sequence (GSPO)     importance: token | sequence
  5. Clipping     min(r A, clip(r, 1 - low, 1 + high) A)       clip_low, clip_high (DAPO)
  6. KL           to the frozen start, in the loss             kl_coef, kl_estimator: k3 | k1 | k2
  7. Aggregation  mean over all tokens, mean over sequences,   loss_agg: token | sequence
                  or a constant divisor (Dr. GRPO)                       | constant

Left out: a value network, top-k and top-p, KL in the reward, an asynchronous sampler.

Four sizes count prompts. A step samples `prompts`. An optimiser step uses a mini-batch of
`mini_batch` of them, over all processes, and each mini-batch is used `epochs` times. On each
process, a decoding loop holds `sample_batch`, and a forward pass as many as `micro_tokens` allows.
Shapes: B prompts, G completions of each, R = B * G rows, T tokens.

With init=auto, a start that does not exist is trained first. Writes OUT/grpo/ (config.yaml,
metrics.jsonl, samples.jsonl, step_N/, last), continues from `last` when started again, and ends
with OUT/eval/, which compares before and after.
"""

from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

import data
import eval as evaluation
import model
import rewards
import train_sft
from data import Example, batched
from model import Optimizer, Policy, Rollout, pad_rows, save_checkpoint
from runtime.checkpoint import last_step, open_run, resolve
from runtime.config import Config, GRPOConfig, InputError
from runtime.log import Log
from runtime.memory import tokens_that_fit
from runtime.metrics import GAP, rollout_metrics, sample_records, update_metrics
from runtime.output import print0, rank, world_size
from runtime.processes import StopRequest, gather_lists, gather_rows, run_main, start_training

# ------------------------------------------------------------------------------- the algorithm

EQUAL = 1e-6  # rewards closer than this differ by rounding only
PROMPTS_TO_TRY = 16  # the longest of these is tried in the preflight


def group_advantages(rewards: Tensor, norm: str = "group", eps: float = 1e-4) -> Tensor:
    """Advantages (B, G) of rewards (B, G): reward minus group mean, over a standard deviation.

    norm: the std of the group, of the whole batch, or none. Equal rewards give zeros. G > 1.
    Computed in float64.
    """
    r = rewards.double()
    centred = r - r.mean(1, keepdim=True)
    if norm == "group":
        scale = r.std(1, keepdim=True) + eps
    elif norm == "batch":
        scale = r.std() + eps
    else:
        scale = 1.0

    # A tiny std would turn rounding into large advantages.
    spread = r.amax(1, keepdim=True) - r.amin(1, keepdim=True)
    advantages = torch.where(spread > EQUAL, centred / scale, 0.0)
    return advantages.to(rewards.dtype)


def policy_loss(
    logp: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip_low: float,
    clip_high: float,
    importance: str = "token",
) -> tuple[Tensor, Tensor]:
    """Returns the loss of each token, -min(r A, clip(r) A), and the ratio r = pi / pi_old, (R, T).

    logp, old_logp and the boolean mask are (R, T), advantages (R,).
    """
    log_ratio = torch.where(mask, logp - old_logp, 0.0)
    if importance == "sequence":
        # GSPO: one ratio per completion, the geometric mean over its tokens.
        lengths = mask.sum(1).clamp(min=1)
        mean = log_ratio.sum(1) / lengths  # (R,)
        log_ratio = mean[:, None].expand_as(logp)
    ratio = log_ratio.exp()

    # min: the objective never gains from a ratio outside of the clipping range.
    a = advantages[:, None]
    unclipped = ratio * a
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high) * a
    return -torch.min(unclipped, clipped), ratio


def kl_terms(logp: Tensor, ref_logp: Tensor) -> dict[str, Tensor]:
    """Estimates of KL(policy || reference) from the policy's samples, per token (Schulman 2020).

    k1 = log pi - log ref: unbiased, noisy.
    k2 = k1^2 / 2: biased, low variance.
    k3 = ref/pi - 1 - log(ref/pi): unbiased, never negative.

    Their gradients, for samples of the present policy, are in expectation: of k1 zero, of k2 that
    of KL(policy || reference), of k3 that of KL(reference || policy).
    """
    k1 = logp - ref_logp
    k2 = k1.square() / 2
    k3 = torch.expm1(-k1) + k1
    return {"k1": k1, "k2": k2, "k3": k3}


def token_weights(
    mask: Tensor, loss_agg: str, n_tokens: int, n_sequences: int, max_new_tokens: int
) -> Tensor:
    """Weights (R, T) such that the loss is sum(weights * loss of each token).

    n_tokens and n_sequences count the whole optimiser step, over all micro-batches and processes:
    a mean of micro-batch means would weigh tokens unevenly.
    """
    mask = mask.float()
    if loss_agg == "token":
        return mask / max(1, n_tokens)
    if loss_agg == "sequence":
        lengths = mask.sum(1, keepdim=True).clamp(min=1)
        return mask / lengths / max(1, n_sequences)
    return mask / (max(1, n_sequences) * max_new_tokens)


def grpo_loss(
    logp: Tensor,
    old_logp: Tensor,
    ref_logp: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    weights: Tensor,
    grpo: GRPOConfig,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of one micro-batch, a scalar, and what to log of its tokens, (R, T) each."""
    # 4, 5. Ratio and clipping.
    loss, ratio = policy_loss(
        logp, old_logp, advantages, mask, grpo.clip_low, grpo.clip_high, grpo.importance
    )
    # The tokens that clipping gives no gradient: the ratio has left the range in the direction that
    # the advantage asks for. (completions/clipped_ratio is something else: completions cut off.)
    a = advantages[:, None]
    is_low = ratio < 1 - grpo.clip_low
    is_high = ratio > 1 + grpo.clip_high
    low = is_low & (a < 0)
    high = is_high & (a > 0)
    values = {
        "ratio": ratio,
        "clip_ratio/low_mean": low,
        "clip_ratio/high_mean": high,
        "clip_ratio/region_mean": low | high,
    }

    # 6. KL to the reference.
    if ref_logp is not None:
        terms = kl_terms(logp, ref_logp)
        kl = terms[grpo.kl_estimator]
        loss = loss + grpo.kl_coef * kl
        values["kl"] = kl
        for name, term in terms.items():
            values[f"kl/{name}"] = term

    # 7. Aggregation.
    return (weights * loss).sum(), values


# ------------------------------------------------------------------------------- one step


def local_mini_batches(examples, grpo):
    """What this process samples from, of each mini-batch of a step."""
    mini_batches = batched(examples, grpo.mini_batch or grpo.prompts)
    return [mini_batch[rank() :: world_size()] for mini_batch in mini_batches]


def sample_mini_batches(
    policy: Policy, examples: list[Example], config: Config, step: int
) -> list[list[Rollout]]:
    """1. G completions of every prompt. Each process samples its share of each mini-batch."""
    grpo = config.grpo
    # Seeds the sampler, together with the example and the number of the completion.
    stream = (config.seed, step)
    mini_batches = []
    # Sharded weights are gathered once for all that follows.
    with policy.unsharded():
        for local in local_mini_batches(examples, grpo):
            rollouts = []
            for chunk in batched(local, grpo.sample_batch):
                rollouts += policy.sample(
                    chunk, grpo.group_size, grpo.max_new_tokens, grpo.temperature, stream
                )
            mini_batches.append(rollouts)
    return mini_batches


def score(rollouts: list[Rollout], config: Config):
    """2. Fill every rollout's rewards, G numbers, and their components."""
    texts = [text for r in rollouts for text in r.texts]
    examples = [r.example for r in rollouts for _ in r.texts]
    token_ids = [ids.tolist() for r in rollouts for ids in r.tokens]
    rewards.say_large_boxes(texts, "a step")
    total, components = rewards.score_completions(texts, examples, config.rewards, token_ids)
    shape = len(rollouts), config.grpo.group_size
    total = total.reshape(shape)
    for i, rollout in enumerate(rollouts):
        rollout.rewards = total[i].tolist()
        # The weights of its task, by name.
        for name in getattr(config.rewards, rollout.example.task):
            values = components[name].reshape(shape)[i]
            # NaN: the component does not apply to a completion.
            if not np.isnan(values).all():
                rollout.reward_components[name] = values.tolist()


def assign_advantages(rollouts: list[Rollout], config: Config):
    """3. Fill every rollout's advantages (G,). Collective."""
    if config.grpo.normalize_parts:
        assign_gdpo_advantages(rollouts, config)
        return
    scores = [r.rewards for r in rollouts]
    advantages = normalize(scores, config.grpo.adv_norm)
    for rollout, row in zip(rollouts, advantages):
        rollout.advantages = row


def assign_gdpo_advantages(rollouts, config):
    """GDPO: normalise each reward component by itself, then take the weighted sum. Collective.

    Normalised after the sum, a component that varies little would hardly count. GDPO's last step,
    to normalise the sum over the batch, is left out.
    """
    for rollout in rollouts:
        rollout.advantages = torch.zeros(config.grpo.group_size)

    # All names on every process, even where no rollout has them: normalize is a collective.
    names = {*config.rewards.report, *config.rewards.grounding}
    for name in sorted(names):
        scored = [r for r in rollouts if name in r.reward_components]
        components = []
        for rollout in scored:
            # A completion that this reward does not apply to counts as average.
            values = torch.tensor(rollout.reward_components[name])
            values = values.nan_to_num(values.nanmean())
            components.append(values.tolist())
        advantages = normalize(components, config.grpo.adv_norm)
        for rollout, row in zip(scored, advantages):
            weights = getattr(config.rewards, rollout.example.task)
            rollout.advantages += weights[name] * row


def normalize(scores, norm):
    """Rewards of this process's groups, G numbers each -> their advantages (G,). Collective:
    adv_norm=batch takes the std over the groups of all processes."""
    # The rewards of all processes, and the slice of them that is ours.
    everyone, local = gather_rows(scores)
    if not everyone:
        return []
    advantages = group_advantages(torch.tensor(everyone), norm)  # (B, G)
    return list(advantages[local])


def trainable_groups(rollouts, grpo):
    """The groups that updates use."""
    if not grpo.drop_degenerate:
        return rollouts
    return [r for r in rollouts if not r.is_degenerate]


def logprobs_of(rollouts, name):
    """Log-probabilities that the rollouts keep, (R, T)."""
    rows = [row for r in rollouts for row in r.logprobs[name]]
    return pad_rows(rows)


def keep_logprobs(rollouts, name, logp):
    """Each rollout keeps its rows of logp (R, T) as logprobs[name], without padding."""
    rows = iter(logp)
    for rollout in rollouts:
        rollout.logprobs[name] = [next(rows)[:length] for length in rollout.lengths]


def score_tokens(policy, rollouts, temperature):
    """Log-probabilities under the policy, entropies and mask of the completions, (R, T) each."""
    prompts = [r.prompt for r in rollouts]
    completions = [r.tokens for r in rollouts]
    return policy.logprobs(prompts, completions, temperature)


@torch.no_grad()
def record_logprobs(policy: Policy, rollouts: list[Rollout], name: str, grpo: GRPOConfig):
    """Keep the log-probabilities under `policy` as logprobs[name] of every rollout."""
    used = trainable_groups(rollouts, grpo)
    with policy.unsharded():
        for micro_batch in policy.micro_batches(used, grpo.micro_tokens):
            logp, _, _ = score_tokens(policy, micro_batch, grpo.temperature)
            keep_logprobs(micro_batch, name, logp)


@dataclass
class UpdateStats:
    """What there is to log of one optimiser step."""

    sums: list[dict[str, float]]  # over tokens, of each micro-batch of this process
    grad_norm: float  # of all processes


def update(
    policy: Policy, optimizer: Optimizer, rollouts: list[Rollout], grpo: GRPOConfig
) -> UpdateStats:
    """4-7. One optimiser step on a mini-batch, of which `rollouts` is our share. Collective."""
    # The divisors of the loss count all micro-batches and processes, so they come first.
    used = trainable_groups(rollouts, grpo)
    lengths = gather_lists([sum(r.lengths) for r in used])
    n_tokens = sum(lengths)
    # A constant divisor stays constant when groups are dropped.
    counted = rollouts if grpo.loss_agg == "constant" else used
    groups = gather_lists([len(r.tokens) for r in counted])
    n_sequences = sum(groups)
    if n_tokens == 0:
        return UpdateStats([], 0.0)

    # Gradients add up over micro-batches. Sharded weights want all processes to run as many forward
    # and backward passes: after our last micro-batch with_dummy_steps runs those that are missing.
    sums = []
    parts = policy.micro_batches(used, grpo.micro_tokens)
    for micro_batch in policy.with_dummy_steps(parts):
        logp, entropy, mask = score_tokens(policy, micro_batch, grpo.temperature)  # (R, T) each

        # For 4: log-probs under pi_old, the policy that sampled. Before the first update the policy
        # is still pi_old: keep logp for later epochs. Before later ones `train` recorded them.
        if "old" not in micro_batch[0].logprobs:
            keep_logprobs(micro_batch, "old", logp.detach())
        old_logp = logprobs_of(micro_batch, "old")
        ref_logp = logprobs_of(micro_batch, "reference") if grpo.kl_coef else None

        advantages = torch.cat([r.advantages for r in micro_batch])  # (R,)
        advantages = advantages.to(logp.device, non_blocking=True)
        weights = token_weights(mask, grpo.loss_agg, n_tokens, n_sequences, grpo.max_new_tokens)
        loss, values = grpo_loss(logp, old_logp, ref_logp, advantages, mask, weights, grpo)
        loss.backward()

        # The gap between sampling and scoring. Both are log-probs under pi_old, so it checks the
        # sampler. Padding is 0 in both.
        gap = (old_logp - logprobs_of(micro_batch, "sampled")).abs()
        # To log: sums over tokens, which update_metrics divides by all tokens of the step.
        values["tokens"] = mask
        values["entropy"] = entropy
        values[f"{GAP}/mean"] = gap
        logged = {"loss": loss.detach(), f"{GAP}/max": gap.max()}
        for name, value in values.items():
            logged[name] = (value.detach() * mask).sum()
        sums.append(logged)
    # Gradients: sum over processes, clip, step unless they are infinite, forget.
    grad_norm = optimizer.step(grpo.lr)
    # A number that is read waits for the GPU, so all are read here.
    return UpdateStats(tree_map(float, sums), grad_norm)


# ------------------------------------------------------------------------------- the loop


def train(config: Config, run: Path, start: str, stop: StopRequest):
    """Run GRPO from the checkpoint `start`, or continue it, until its last step or a stop."""
    train_examples = data.load_split(config, "train")
    policy, optimizer, state = model.load_or_resume(run, config, start, config.grpo)
    reference = load_reference(policy, config, start)
    config = preflight(policy, train_examples, config, state)
    grpo = config.grpo
    log = Log(run, config, state["step"], grpo.steps)
    print0(f"{run}: steps {state['step']} to {grpo.steps}, from {start}; {grpo.micro_tokens=}")

    # From state["step"] on, with a progress bar and a clock.
    for step in log.steps():
        # 1. Rollout: the policy samples G completions of each prompt. What follows fills these in.
        examples = data.grpo_batch(train_examples, step, config)
        mini_batches = sample_mini_batches(policy, examples, config, step)
        rollouts = list(chain.from_iterable(mini_batches))
        log.lap("sample")
        # 2. Rewards: text and boxes in, numbers out.
        score(rollouts, config)
        # 3. Advantages: how much better a completion is than the others of its group.
        assign_advantages(rollouts, config)
        log.lap("reward")
        # For 6: log-probs under the frozen reference, which may be the policy without adapters.
        if reference:
            with reference.without_adapters():
                record_logprobs(reference, rollouts, "reference", grpo)
        log.lap("reference")
        # For 4: log-probs under pi_old of all mini-batches that come after an update.
        if len(mini_batches) > 1:
            after_first = rollouts[len(mini_batches[0]) :]
            record_logprobs(policy, after_first, "old", grpo)
        log.lap("old")
        # 4-7. Ratio, clipping, KL, aggregation: an optimiser step per mini-batch and epoch.
        updates = []
        for _ in range(grpo.epochs):
            for mini_batch in mini_batches:
                updates.append(update(policy, optimizer, mini_batch, grpo))
        log.lap("update")

        # Log, save, and stop if any process was asked to.
        done = step + 1
        metrics = rollout_metrics(rollouts, step) | update_metrics(updates)
        log.metrics(done, metrics | {"learning_rate": grpo.lr})
        log.samples(done, sample_records(rollouts, examples))
        stopping = stop.requested()
        if stopping or done % grpo.save_every == 0 or done == grpo.steps:
            save_checkpoint(run, done, policy, optimizer, micro_tokens=grpo.micro_tokens)
        if stopping and done < grpo.steps:
            print0(f"{run}: stopped after step {done}; the same command continues from here")
            return


# ------------------------------------------------------------------------------- before the loop


def preflight(policy: Policy, examples: list[Example], config: Config, state: dict) -> Config:
    """Fail now rather than after hours: try a large update, then the evaluation.

    The update has the longest of the first prompts and completions of full length. (Sampling at
    full length is not tried.) Returns the config, with grpo.micro_tokens chosen. Collective.
    """
    grpo = config.grpo
    data.say_repeats(examples, config)
    # One by one: only as many images are opened as it takes.
    pairs = chain.from_iterable(policy.encode_all([example]) for example in examples)
    prompts = [prompt for _, prompt in islice(pairs, PROMPTS_TO_TRY)]
    if not prompts:
        raise InputError("none of the training examples can be used (see the messages above)")
    longest = max(prompts, key=len)
    # With sharded weights, a process runs this one, without effect, while others have more to do.
    policy.dummy_prompt = longest
    # Updates find a frozen tower's output remembered, from sampling, and do not run it. Nor may
    # they for this prompt: no other process would take part.
    with policy.unsharded():
        policy.remember_images([longest])

    lengths = [grpo.max_new_tokens] * grpo.group_size
    size = policy.tokens_to_score([longest], [lengths])
    first_batch = data.grpo_batch(examples, state["step"], config)
    first_mini_batch, *_ = local_mini_batches(first_batch, grpo)
    # A run that is resumed goes on with the number that it began with.
    micro_tokens = grpo.micro_tokens or state.get("micro_tokens", 0)
    try:
        if not micro_tokens:
            # What half of the free memory holds, on the process with the least of it.
            work = partial(try_update, policy, [longest], grpo)
            micro_tokens = tokens_that_fit(work, size)
        count = max(1, min(len(first_mini_batch), micro_tokens // size))
        try_update(policy, [longest] * count, grpo)
    except torch.OutOfMemoryError as error:
        raise InputError(
            f"the largest batch does not fit (grpo.micro_tokens={micro_tokens}, at least one group "
            f"of {grpo.group_size}): lower grpo.micro_tokens, grpo.group_size, model.max_pixels or "
            f"grpo.max_new_tokens, or set model.gradient_checkpointing=true "
            f"({str(error).splitlines()[0]})"
        ) from None
    policy.model.zero_grad()

    evaluation.try_evaluation(policy, config)
    # Last, as workers decode for one list of examples at a time.
    policy.encode_ahead(upcoming(examples, config, state["step"]))
    return replace(config, grpo=replace(grpo, micro_tokens=micro_tokens))


def try_update(policy, prompts, grpo):
    """Forward and backward of prompts with completions of full length."""
    row = policy.stop_ids[:1].expand(grpo.max_new_tokens)
    group = [row] * grpo.group_size
    completions = [group] * len(prompts)
    logp, _, _ = policy.logprobs(prompts, completions, grpo.temperature)
    logp.sum().backward()


def upcoming(examples, config, first_step):
    """The examples of all steps to come, in the order in which sample_mini_batches takes them."""
    for step in range(first_step, config.grpo.steps):
        batch = data.grpo_batch(examples, step, config)
        for mini_batch in local_mini_batches(batch, config.grpo):
            yield from mini_batch


def load_reference(policy: Policy, config: Config, start: str):
    """The policy that the KL term refers to: the start. None if there is no such term.

    With LoRA, it is the policy itself, with its adapters switched off.
    """
    if not config.grpo.kl_coef:
        return None
    if config.grpo.lora_rank:
        return policy
    reference = model.load_policy(config, start)
    if policy.sharded:
        reference.shard()
    return reference.freeze_all()


def starting_point(config, stop):
    """The checkpoint to start from; auto: that of SFT, trained if missing. None if stopped."""
    init = config.grpo.init
    if init == "base":
        return config.model.path
    if init == "auto":
        stage = "cold_start" if config.data.thinking else "sft"
        best = train_sft.train_up_to(config, stage, stop)
        return str(best) if best else None
    if not Path(init).is_dir():
        raise InputError(
            f"grpo.init={init}: no such checkpoint folder (auto trains one, base starts from "
            f"model.path)"
        )
    return resolve(init)


def main():
    config, stop = start_training(__doc__)
    rewards.check_rewards(config.rewards)
    evaluation.library_scores(config)
    data.check_tasks(config)

    # A run continues only with the settings that it was started with.
    run = Path(config.out, "grpo")
    sections = ["model", "data", "grpo", "rewards"]
    if config.grpo.init == "auto":
        sections.append("sft")
    open_run(run, config, sections, config.grpo.steps)

    start = starting_point(config, stop)
    if start and last_step(run) < config.grpo.steps:
        train(config, run, start, stop)

    # Compare the start with the result.
    if not stop.requested():
        stop.release()
        evaluation.compare_with_start(config, start, run)
    stop.finish()


if __name__ == "__main__":
    run_main(main)
