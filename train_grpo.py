"""Group relative policy optimisation for chest X-ray reports and grounding, by hand.

  torchrun train_grpo.py config.yaml [key=value ...]          # or python train_grpo.py ...; --nproc_per_node 8 for more

What of GRPO is here, top to bottom, and the switch for each part
  1. Sampling      G completions per prompt from the full softmax      grpo.group_size, temperature, max_new_tokens
  2. Rewards       several parts per task, weighted                    rewards.report, rewards.grounding
  3. Advantages    reward against the group's mean, over its std       grpo.adv_norm: group | none (Dr. GRPO) | batch
                   every part normalised by itself (GDPO)              grpo.normalize_parts
                   groups that teach nothing left out                  grpo.drop_degenerate
  4. Ratio         pi / pi_old per token or per sequence (GSPO)        grpo.importance; epochs, mini_batch: updates per rollout
  5. Clipping      min(r A, clip(r, 1 - low, 1 + high) A)              grpo.clip_low, clip_high (DAPO's clip-higher)
  6. KL            to the frozen start, in the loss                    grpo.kl_coef (0: no reference), kl_estimator: k1 | k2 | k3
  7. Aggregation   over all tokens of the step, per sequence, or a constant (Dr. GRPO)                       grpo.loss_agg
Left out: a value network, top-k / top-p while training, KL in the reward, an asynchronous sampler.

With grpo.init=auto, a checkpoint to start from that does not exist is trained first. Writes OUT/grpo/ (config.yaml, metrics.jsonl,
samples.jsonl, step_N/, last), continues from `last` when started again, and ends with OUT/eval: before and after.
"""

import time
from collections import Counter
from dataclasses import replace
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import data
import eval as evaluation
import model
import rewards
import train_sft
from data import InputError

# ---------------------------------------------------------------------------------------------- the algorithm

EQUAL = 1e-6  # rewards closer than this are equal: their difference is rounding


def group_advantages(rewards, norm="group", eps=1e-4):
    """Advantages (B, G) of rewards (B, G): reward - group mean, divided by the group's std, nothing, or the batch's std.

    A group whose rewards are all equal (and so any group of one) gets zeros. float64 inside.
    """
    r = rewards.double()
    centred = r - r.mean(1, keepdim=True)
    spread = r.amax(1, keepdim=True) - r.amin(1, keepdim=True)
    if norm == "group":
        scale = r.std(1, keepdim=True, correction=min(1, r.shape[1] - 1)) + eps
    elif norm == "batch":
        scale = r.std(correction=min(1, r.numel() - 1)) + eps
    else:
        scale = 1.0
    return torch.where(spread > EQUAL, centred / scale, 0.0).to(rewards.dtype)


def policy_loss(logp, old_logp, advantages, mask, clip_low, clip_high, importance="token"):
    """The clipped surrogate, per token: -min(r A, clip(r) A), with r = pi / pi_old. (R, T) each, advantages (R,).

    importance="sequence": one ratio per completion, its geometric mean over tokens (GSPO). Returns (loss, ratio), (R, T).
    """
    log_ratio = torch.where(mask, logp - old_logp, 0.0)
    if importance == "sequence":
        log_ratio = (log_ratio.sum(1) / mask.sum(1).clamp(min=1))[:, None].expand_as(logp)
    ratio = log_ratio.exp()
    a = advantages[:, None]
    return -torch.min(ratio * a, ratio.clamp(1 - clip_low, 1 + clip_high) * a), ratio


def kl_terms(logp, ref_logp):
    """Per-token estimates of KL(policy || reference) from samples of the policy (Schulman 2020), (R, T) each.

    k1 = log pi - log ref: unbiased, noisy, and its gradient is zero in expectation; k2 = k1^2 / 2: biased, low variance;
    k3 = ref/pi - 1 - log(ref/pi): unbiased and never negative.
    """
    k1 = logp - ref_logp
    return {"k1": k1, "k2": k1.square() / 2, "k3": torch.expm1(-k1) + k1}


def token_weights(mask, loss_agg, n_tokens, n_sequences, max_new_tokens):
    """w (R, T) such that the loss is sum(w * per-token loss). n_tokens and n_sequences count the whole optimiser step,
    all micro-batches and processes: a mean of micro-batch means would weigh tokens unevenly."""
    mask = mask.float()
    if loss_agg == "token":
        return mask / max(1, n_tokens)
    if loss_agg == "sequence":
        return mask / mask.sum(1, keepdim=True).clamp(min=1) / max(1, n_sequences)
    return mask / (max(1, n_sequences) * max_new_tokens)


def grpo_loss(logp, old_logp, ref_logp, advantages, mask, weights, grpo):
    """The scalar loss of one micro-batch, and values of its tokens to log, (R, T) each. old_logp None: the policy's own."""
    old_logp = logp.detach() if old_logp is None else old_logp
    loss, ratio = policy_loss(
        logp, old_logp, advantages, mask, grpo.clip_low, grpo.clip_high, grpo.importance
    )
    a = advantages[:, None]
    values = {
        "clip_ratio/low_mean": (ratio < 1 - grpo.clip_low) & (a < 0),
        "ratio": ratio,
        "clip_ratio/high_mean": (ratio > 1 + grpo.clip_high) & (a > 0),
    }
    if ref_logp is not None:
        kl = kl_terms(logp, ref_logp)
        loss = loss + grpo.kl_coef * kl[grpo.kl_estimator]
        values |= {f"kl/{name}": value for name, value in kl.items()}
    return (weights * loss).sum(), values


# ---------------------------------------------------------------------------------------------- one step


def score(rollouts, config):
    """Fills every rollout's rewards (G,) and their parts."""
    completions = [text for r in rollouts for text in r.texts]
    examples = [r.example for r in rollouts for _ in r.texts]
    token_ids = [ids.tolist() for r in rollouts for ids in r.tokens]
    total, parts = rewards.score_completions(
        completions, examples, config.rewards, data.style_of(config), token_ids
    )
    for i, r in enumerate(rollouts):
        group = slice(i * len(r.texts), (i + 1) * len(r.texts))
        r.rewards = torch.tensor(total[group], dtype=torch.float32)
        r.parts = {
            name: torch.tensor(values[group], dtype=torch.float32)
            for name, values in parts.items()
            if not np.isnan(values[group]).all()
        }  # NaN: the part is not for this task


def assign_advantages(rollouts, config):
    """Fills every rollout's advantages (G,); rewards of all processes count for adv_norm=batch."""
    grpo = config.grpo

    def normalised(values):
        """values: one (G,) tensor per local rollout -> advantages, one (G,) per local rollout."""
        everyone = model.gather_objects(values)
        first, table = (
            sum(map(len, everyone[: model.rank()])),
            [v for part in everyone for v in part],
        )
        return (
            group_advantages(torch.stack(table), grpo.adv_norm)[first : first + len(values)]
            if table
            else []
        )

    if not grpo.normalize_parts:
        advantages = normalised([r.rewards for r in rollouts])
    else:
        advantages = [torch.zeros(grpo.group_size) for _ in rollouts]
        for name in sorted({*config.rewards.report, *config.rewards.grounding}):
            paid = [
                (a, r) for a, r in zip(advantages, rollouts) if name in r.parts
            ]  # the part is for their task
            for (a, r), part in zip(
                paid,
                normalised([r.parts[name].nan_to_num(r.parts[name].nanmean()) for _, r in paid]),
            ):
                a += getattr(config.rewards, r.example.task)[name] * part
    for r, a in zip(rollouts, advantages):
        r.advantages = a


def degenerate(rollout):
    """No advantage, no policy gradient: all rewards are equal (or their normalised parts cancel)."""
    return not bool(rollout.advantages.any())


def kept(rollouts, grpo):
    return [r for r in rollouts if not (grpo.drop_degenerate and degenerate(r))]


def pieces(items, size):
    return [items[i : i + size] for i in range(0, len(items), size)]


@torch.no_grad()
def fixed_logprobs(policy, rollouts, grpo):
    """For each rollout G tensors (T_g,): log-probabilities under a policy that stays as it is during the step."""
    result = []
    with policy.gathered():
        for micro in pieces(rollouts, grpo.micro_batch):
            logp, _, mask = policy.logprobs(
                [r.prompt for r in micro], [r.tokens for r in micro], grpo.temperature
            )
            result += pieces([row[real] for row, real in zip(logp, mask)], grpo.group_size)
    return result


def padded(groups):
    """Lists of G tensors (T_g,) -> (R, T)."""
    return pad_sequence([row for group in groups for row in group], batch_first=True)


def update(policy, optimizers, rollouts, lr, grpo):
    """One optimiser step on these rollouts (this process's share of the mini-batch): (token sums to log, gradient norm).

    Rollouts without old_logprobs have met no update yet: the policy is pi_old, and its log-probs are recorded."""
    used = kept(rollouts, grpo)
    divided = (
        rollouts if grpo.loss_agg == "constant" else used
    )  # a constant stays one whatever is dropped
    counts = model.gather_objects(
        (sum(len(t) for r in used for t in r.tokens), sum(len(r.tokens) for r in divided))
    )
    n_tokens, n_sequences = (sum(c) for c in zip(*counts))
    sums = Counter(gap_max=0.0)
    for micro in policy.together(pieces(used, grpo.micro_batch)) if n_tokens else ():
        prompts, completions = [r.prompt for r in micro], [r.tokens for r in micro]
        mask = padded(
            [[torch.ones_like(t, dtype=torch.bool) for t in group] for group in completions]
        )  # (R, T)
        advantages = torch.cat([r.advantages for r in micro]).to(mask.device)  # (R,)
        old_logp = padded([r.old_logprobs for r in micro]) if micro[0].old_logprobs else None
        ref_logp = padded([r.ref_logprobs for r in micro]) if micro[0].ref_logprobs else None
        weights = token_weights(mask, grpo.loss_agg, n_tokens, n_sequences, grpo.max_new_tokens)
        logp, entropy, _ = policy.logprobs(prompts, completions, grpo.temperature)
        loss, values = grpo_loss(logp, old_logp, ref_logp, advantages, mask, weights, grpo)
        loss.backward()
        if old_logp is None:
            for r, rows in zip(micro, pieces(logp.detach(), grpo.group_size)):
                r.old_logprobs = [row[: len(t)] for row, t in zip(rows, r.tokens)]
        gap = (logp.detach() - padded([r.logprobs for r in micro])).abs()[mask]
        sums.update(
            {
                "tokens": int(mask.sum()),
                "loss": float(loss.detach()),
                "entropy": float(entropy.sum()),
                "gap": float(gap.sum()),
                **{name: float(value.detach()[mask].sum()) for name, value in values.items()},
            }
        )
        sums["gap_max"] = max(sums["gap_max"], float(gap.max()))
    return sums, model.optimizer_step(policy, optimizers, lr, grpo.grad_clip) if n_tokens else 0.0


def rollout_metrics(rollouts):
    """What the samples of this process look like: (rewards, lengths, finished, degenerate, parts) of each rollout."""
    return [
        (
            r.rewards,
            [len(t) for t in r.tokens],
            r.finished,
            degenerate(r),
            {k: v.tolist() for k, v in r.parts.items()},
        )
        for r in rollouts
    ]


def mean(values):
    values = list(values)
    return sum(values) / len(values) if values else 0.0


def step_metrics(everyone, sums, norms, grpo):
    """One line of metrics.jsonl. everyone: rollout_metrics of all processes; sums: token sums of every update of all
    processes. Names follow TRL's GRPOTrainer where it has one."""
    rewards_, lengths, finished, equal, parts = zip(*sum(everyone, []))
    rewards_, lengths, finished = (
        torch.stack(rewards_),
        sum(lengths, []),
        sum(finished, []),
    )  # (B, G), two lists of B * G
    ended = [n for n, f in zip(lengths, finished) if f]
    values = {
        "reward": float(rewards_.mean()),
        "reward_std": float(rewards_.std(1, correction=0).mean()),
        "frac_reward_zero_std": mean(equal),
    }
    for name in sorted({name for p in parts for name in p}):
        column = torch.tensor([v for p in parts if name in p for v in p[name] if v == v])
        values |= {
            f"rewards/{name}/mean": float(column.mean()),
            f"rewards/{name}/std": float(column.std(correction=0)),
        }
    values |= {
        "completions/mean_length": mean(lengths),
        "completions/min_length": min(lengths),
        "completions/max_length": max(lengths),
        "completions/mean_terminated_length": mean(ended),
        "completions/clipped_ratio": 1 - mean(finished),
    }
    tokens = max(1, sum(s["tokens"] for s in sums))

    def total(name):
        return sum(s[name] for s in sums)

    values |= {
        "loss": total("loss") / max(1, len(norms)),
        "grad_norm": mean(norms),
        "entropy": total("entropy") / tokens,
        "ratio": total("ratio") / tokens,
        "clip_ratio/low_mean": total("clip_ratio/low_mean") / tokens,
        "clip_ratio/high_mean": total("clip_ratio/high_mean") / tokens,
        "sampling/sampling_logp_difference/mean": total("gap") / tokens,
        "sampling/sampling_logp_difference/max": max(s["gap_max"] for s in sums),
        "num_tokens": sum(lengths),
    }
    values["clip_ratio/region_mean"] = (
        values["clip_ratio/low_mean"] + values["clip_ratio/high_mean"]
    )
    if any("kl/k1" in s for s in sums):
        values |= {f"kl/{k}": total(f"kl/{k}") / tokens for k in ("k1", "k2", "k3")}
        values["kl"] = values[f"kl/{grpo.kl_estimator}"]
    return values


# ---------------------------------------------------------------------------------------------- the loop


def preflight(policy, examples, config):
    """What could fail hours later, once, without effect: an update of the longest of some prompts with completions of full length (running
    out of memory shows in the first minute), and a few tokens of the final evaluation's first examples."""
    grpo = config.grpo
    usable = (prompt for example in examples for _, prompt in policy.encode_all([example]))
    prompts = sorted(
        islice(usable, 4 * grpo.micro_batch), key=lambda prompt: prompt["input_ids"].shape[1]
    )[-grpo.micro_batch :]
    if not prompts:
        raise InputError("none of the training examples can be used (see the messages above)")
    policy.spare = prompts[0]
    ids = torch.full((grpo.max_new_tokens,), int(policy.stop_ids[0]), device=policy.device)
    try:
        logp, _, _ = policy.logprobs(
            prompts, [[ids] * grpo.group_size] * len(prompts), grpo.temperature
        )
        logp.sum().backward()
    except torch.OutOfMemoryError as error:
        raise InputError(
            f"the largest batch that a step may need does not fit: lower grpo.micro_batch={grpo.micro_batch} or grpo.max_new_tokens="
            f"{grpo.max_new_tokens}, or set model.gradient_checkpointing=true ({str(error).splitlines()[0]})"
        ) from None
    for p in policy.parameters():
        p.grad = None
    with policy.gathered():
        evaluation.predict(
            policy,
            evaluation.chosen_examples(config)[:2],
            replace(config, grpo=replace(grpo, max_new_tokens=4)),
            "a try",
        )


def starting_point(config, stop):
    """The folder that GRPO starts from (None: model.path itself). The sft checkpoint is trained if it is missing."""
    init = config.grpo.init
    if init == "base":
        return None
    if init != "auto":
        if not Path(init).is_dir():
            raise InputError(
                f"grpo.init={init}: no such checkpoint folder (auto trains one, base starts from model.path)"
            )
        return Path(evaluation.resolve(init))
    return train_sft.trained(config, "cold_start" if config.data.thinking else "sft", stop)


def train(config, stop):
    """Runs GRPO to its last step (or on from the last checkpoint). Returns {name: folder} to compare, or None when stopped."""
    grpo, run = config.grpo, Path(config.out, "grpo")
    rewards.check_rewards(config.rewards)
    tasks = {task for source in data.sources(config, "train") for task in source.tasks}
    if not {"report", "grounding"} & {data.TASK_OF[task] for task in tasks}:
        raise InputError(f"data.tasks={sorted(tasks)}: GRPO needs report or grounding examples")
    model.open_run(
        run, config, ["model", "data", "grpo", "rewards"] + ["sft"] * (grpo.init == "auto")
    )
    if model.last_step(run) > grpo.steps:
        raise InputError(
            f"{run} is already at step {model.last_step(run)}, past grpo.steps={grpo.steps}"
        )
    start = starting_point(config, stop)
    if stop:
        return None
    name = start.parent.name if start else ""
    checkpoints = {
        name if name in ("sft", "cold_start") else "start": start or config.model.path,
        "grpo": run / "last",
    }
    control = Path(config.out, "more")
    if model.last_step(control) >= config.sft.more_steps:  # continued SFT, if it was trained
        checkpoints["more"] = control / "best"
    if model.last_step(run) == grpo.steps:
        return checkpoints
    examples = data.load_split(config, "train")
    policy, optimizers, state = model.resume(run, config, start, grpo)
    reference = policy
    if grpo.kl_coef and not grpo.lora_rank:
        reference = model.load_policy(config, start)
        if policy.sharded:
            reference.shard()
    log = model.Log(run, state["step"], config)
    model.say(
        f"{run}: {grpo.prompts} prompts x {grpo.group_size} completions, steps {state['step']} to {grpo.steps}, "
        f"from {start or config.model.path}"
    )
    preflight(policy, examples, config)
    bad = 0
    bar = tqdm(
        range(state["step"], grpo.steps),
        run.name,
        initial=state["step"],
        total=grpo.steps,
        disable=model.rank() != 0,
    )
    for step in bar:
        laps = [("start", time.perf_counter())]

        def lap(name):
            laps.append((f"time/{name}", time.perf_counter()))

        chosen = data.batch(
            examples, grpo.prompts, step, config.seed, "grpo", config.data.report_share
        )
        with policy.gathered():
            minis = [
                [
                    r
                    for some in pieces(
                        mini[model.rank() :: model.world_size()], grpo.sample_batch
                    )  # this process's share
                    for r in policy.sample(
                        some,
                        grpo.group_size,
                        grpo.max_new_tokens,
                        grpo.temperature,
                        (config.seed, step),
                    )
                ]
                for mini in pieces(chosen, grpo.mini_batch or grpo.prompts)
            ]
        rollouts = [r for mini in minis for r in mini]
        if not sum(model.gather_objects(len(rollouts))):
            raise InputError(
                f"step {step + 1}: none of its {len(chosen)} prompts can be used (see the messages above)"
            )
        lap("sample")
        score(rollouts, config)
        assign_advantages(rollouts, config)
        lap("reward")
        used = kept(rollouts, grpo)
        with reference.without_adapters():  # the policy without its adapters is where it started
            for r, logprobs in zip(
                used, fixed_logprobs(reference, used, grpo) if grpo.kl_coef else ()
            ):
                r.ref_logprobs = logprobs
        lap("reference")
        # pi_old: for the first mini-batch the policy itself; for the others its log-probs before the first update.
        later = [r for mini in minis[1:] for r in kept(mini, grpo)]
        for r, logprobs in zip(
            later, fixed_logprobs(policy, later, grpo) if len(minis) > 1 else ()
        ):
            r.old_logprobs = logprobs
        lap("old")
        lr = grpo.lr * min(1, (step + 1) / max(1, grpo.warmup))
        results = [
            update(policy, optimizers, mini, lr, grpo) for _ in range(grpo.epochs) for mini in minis
        ]
        lap("update")
        bad = model.bad_steps(bad, [norm for _, norm in results], config, f"{run}, step {step + 1}")
        everyone = model.gather_objects((rollout_metrics(rollouts), [s for s, _ in results]))
        values = step_metrics(
            [m for m, _ in everyone],
            [s for _, sums in everyone for s in sums],
            [n for _, n in results],
            grpo,
        )
        seconds = laps[-1][1] - laps[0][1]
        values |= {name: then - before for (_, before), (name, then) in pairwise(laps)}
        values |= {
            "learning_rate": lr,
            "step_time": seconds,
            "tokens_per_second": values["num_tokens"] / seconds,
        }
        log.metrics(step + 1, values)
        for task in ("report", "grounding"):
            for r in [r for r in rollouts if r.example.task == task][: config.log.samples]:
                log.sample(
                    step + 1,
                    {
                        "id": r.example.id,
                        "task": task,
                        "question": r.example.question,
                        "reference": r.example.answer,
                        "samples": [
                            {
                                "text": text,
                                "reward": float(reward),
                                "advantage": float(a),
                                "parts": {
                                    k: float(v[g]) for k, v in r.parts.items() if v[g] == v[g]
                                },
                            }
                            for g, (text, reward, a) in enumerate(
                                zip(r.texts, r.rewards, r.advantages)
                            )
                        ],
                    },
                )
        bar.set_postfix(reward=f"{values['reward']:.3f}", kl=f"{values.get('kl', 0):.4f}")
        stopping, done = bool(stop), step + 1
        if stopping or done % grpo.save_every == 0 or done == grpo.steps:
            model.save_checkpoint(run, done, policy, optimizers)
        if stopping and done < grpo.steps:
            bar.close()
            model.say(f"{run}: stopped after step {done}; the same command continues from here")
            return None
    return checkpoints


def main():
    config, stop = model.start(__doc__)
    checkpoints = train(config, stop)
    if checkpoints and not stop:
        stop.release()
        evaluation.evaluate_checkpoints(config, checkpoints)
    stop.finish()


if __name__ == "__main__":
    data.run_main(main, rewards.RewardError)
