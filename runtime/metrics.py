"""What GRPO logs of a step: metrics of its rollouts and updates, and the first groups."""

from collections import Counter
from itertools import chain
from typing import Any

import numpy as np
import torch

from runtime.config import InputError
from runtime.processes import gather_lists

GAP = "sampling/sampling_logp_difference"  # between sampling and scoring the same tokens


def rollout_metrics(rollouts: list, step: int) -> dict[str, Any]:
    """What the samples of all processes look like. Names follow TRL's GRPOTrainer. Collective."""
    totals = gather_lists([r.rewards for r in rollouts])
    lengths = gather_lists([r.lengths for r in rollouts])
    finished = gather_lists([r.finished for r in rollouts])
    degenerate = gather_lists([r.is_degenerate for r in rollouts])
    components = gather_lists([r.reward_components for r in rollouts])
    if not components:
        raise InputError(f"step {step + 1}: none of its prompts can be used (see above)")
    totals = torch.tensor(totals)  # (B, G)
    lengths = torch.tensor(lengths).double()  # (B, G)
    finished = torch.tensor(finished)  # (B, G)
    metrics = {
        "reward": totals.mean(),
        "reward_std": totals.std(1, correction=0).mean(),
        "frac_reward_zero_std": np.mean(degenerate),
        "completions/mean_length": lengths.mean(),
        "completions/min_length": lengths.min(),
        "completions/max_length": lengths.max(),
        "completions/mean_terminated_length": lengths[finished].mean().nan_to_num(),
        "completions/clipped_ratio": 1 - finished.double().mean(),
        "num_tokens": lengths.sum(),
    }
    for name in sorted(set().union(*components)):
        # A component belongs to one task, and is NaN where it does not apply to a completion.
        values = [group[name] for group in components if name in group]
        values = torch.tensor(values)
        values = values[~values.isnan()]
        metrics[f"rewards/{name}/mean"] = values.mean()
        metrics[f"rewards/{name}/std"] = values.std(correction=0)
    return metrics


def update_metrics(updates: list) -> dict[str, float]:
    """Means over the tokens of all updates and processes. Collective."""
    sums = chain.from_iterable(u.sums for u in updates)
    sums = gather_lists(list(sums))
    total = Counter()
    for of_micro_batch in sums:
        # Counter.update adds.
        total.update(of_micro_batch)
    # These two are not means over tokens: an update's loss is a sum over its micro-batches.
    loss = total.pop("loss", 0.0)
    total.pop(f"{GAP}/max", None)
    gaps = [of_micro_batch[f"{GAP}/max"] for of_micro_batch in sums]
    n_tokens = total.pop("tokens", 1)
    metrics = {name: value / n_tokens for name, value in total.items()}
    metrics["loss"] = loss / len(updates)
    metrics["grad_norm"] = np.mean([u.grad_norm for u in updates])
    if gaps:
        metrics[f"{GAP}/max"] = max(gaps)
    return metrics


def sample_records(rollouts: list, examples: list) -> list[dict]:
    """The first group of each task, for samples.jsonl: the metrics hide a lot. Collective."""
    records = gather_lists([sample_record(r) for r in rollouts])
    by_id = {record["id"]: record for record in records}
    # In the order of the batch, so that they are the same for any number of processes. An example
    # whose image cannot be read has none.
    first = {}
    for example in examples:
        if example.id in by_id:
            first.setdefault(example.task, by_id[example.id])
    return [first[task] for task in ("report", "grounding") if task in first]


def sample_record(rollout):
    """What samples.jsonl holds of a rollout."""
    samples = []
    for g, text in enumerate(rollout.texts):
        parts = {name: values[g] for name, values in rollout.reward_components.items()}
        sample = {
            "text": text,
            "reward": rollout.rewards[g],
            "advantage": rollout.advantages[g].item(),
            # NaN: the component does not apply.
            "parts": {name: value for name, value in parts.items() if value == value},
        }
        samples.append(sample)
    return {
        "id": rollout.example.id,
        "task": rollout.example.task,
        "question": rollout.example.question,
        "reference": rollout.example.answer,
        "samples": samples,
    }
