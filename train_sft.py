"""Supervised fine-tuning: reports and grounding, and the cold start that teaches thinking.

  python train_sft.py config.yaml
  torchrun --nproc_per_node 8 train_sft.py config.yaml
  python train_sft.py config.yaml sft.stage=more
  python train_sft.py config.yaml sft.stage=cold_start data.thinking=true

`more` trains sft.more_steps on from the result: the control for GRPO.

Writes OUT/STAGE/: config.yaml, metrics.jsonl, step_N/, best (of the lowest validation loss), last.
Started again, the same command continues from `last`.
"""

import math
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import data
import model
from data import Example, batched
from model import Optimizer, Policy, Prompt, save_checkpoint
from runtime.checkpoint import last_step, open_run, resolve
from runtime.config import Config, InputError
from runtime.log import Log
from runtime.output import print0, rank, world_size
from runtime.processes import StopRequest, gather_objects, run_main, start_training

PLAIN_SHARE = 0.5  # of the examples of a cold start, so that plain answers are not forgotten

# ------------------------------------------------------------------------------- the loss


def learning_rate(step: int, steps: int, warmup: int, peak: float) -> float:
    """Linear warm-up to `peak`, then cosine to zero."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    cosine = math.cos(math.pi * progress)
    return peak * 0.5 * (1 + cosine)


@dataclass
class EncodedStudy:
    """A study's images, which run once, and all questions about them."""

    prompt: Prompt  # up to the end of the images
    rows: list[Tensor]  # (T,) ids of each question and its answer
    answer_lengths: list[int]


def encode_studies(policy: Policy, studies: list[list[Example]]) -> list[EncodedStudy]:
    """The usable studies. Each is given as the examples that ask about it."""

    def question_and_answer(example: Example) -> tuple[Tensor, Tensor]:
        return policy.question_ids(example), policy.encode_target(example)

    encoded = []
    for examples in studies:
        # Once, or not at all if its images cannot be used.
        for first, prompt in policy.encode_all(examples[:1]):
            prefix, rest = policy.split_at_images(prompt)
            if not torch.equal(rest, policy.question_ids(first)):
                path = policy.config.model.path
                raise InputError(
                    f"the chat template of model.path={path} does not end its images as expected"
                )
            pairs = [pair for _, pair in policy.encode_all(examples, question_and_answer)]
            if pairs:
                rows = [torch.cat(pair) for pair in pairs]
                lengths = [len(answer) for _, answer in pairs]
                encoded.append(EncodedStudy(prefix, rows, lengths))
    return encoded


def count_answer_tokens(studies):
    return sum(sum(study.answer_lengths) for study in studies)


def sft_loss(policy: Policy, studies: list[EncodedStudy], n_tokens: int) -> Tensor:
    """-sum of the answers' log-probabilities / n_tokens. Questions carry no loss.

    n_tokens counts the answers of the whole step, over all micro-batches and processes.
    """
    prompts = [study.prompt for study in studies]
    rows = [study.rows for study in studies]
    lengths = list(chain.from_iterable(study.answer_lengths for study in studies))
    logp, _, _ = policy.logprobs(prompts, rows, n_scored=lengths)
    return -logp.sum() / n_tokens


def update(
    policy: Policy, optimizer: Optimizer, studies: list[EncodedStudy], lr: float, micro_batch: int
) -> dict[str, float]:
    """One optimiser step on a batch, of which `studies` is our share. Collective.

    Returns what to log; num_tokens is 0 if no process has a study.
    """
    # The divisor of the loss counts all micro-batches and processes, so it comes first.
    counts = gather_objects(count_answer_tokens(studies))
    n_tokens = sum(counts)
    if not n_tokens:
        return {"num_tokens": 0}

    # Gradients add up over micro-batches. The optimizer sums them over processes.
    loss_sum = torch.zeros((), device=policy.device)
    for part in policy.with_dummy_steps(batched(studies, micro_batch)):
        loss = sft_loss(policy, part, n_tokens)
        loss.backward()
        loss_sum += loss.detach()
    grad_norm = optimizer.step(lr)
    losses = gather_objects(loss_sum.item())
    return {
        "loss": sum(losses),
        "grad_norm": grad_norm,
        "learning_rate": lr,
        "num_tokens": n_tokens,
    }


@torch.no_grad()
def validation_loss(policy: Policy, studies: list[list[Example]], micro_batch: int) -> float:
    """Mean loss per answer token. Collective: the studies are split over the processes."""
    loss = 0.0
    n_tokens = 0
    with policy.unsharded():
        local = studies[rank() :: world_size()]
        for chunk in batched(local, micro_batch):
            encoded = encode_studies(policy, chunk)
            if encoded:
                loss += sft_loss(policy, encoded, 1).item()
                n_tokens += count_answer_tokens(encoded)
    n_tokens = sum(gather_objects(n_tokens))
    if not n_tokens:
        raise InputError("none of the validation studies can be used (see the messages above)")
    return sum(gather_objects(loss)) / n_tokens


# ------------------------------------------------------------------------------- the stage


def starting_point(config: Config) -> str:
    """The checkpoint that the stage starts from."""
    stage, init = config.sft.stage, config.sft.init
    if stage == "cold_start" and not config.data.thinking:
        raise InputError("sft.stage=cold_start needs data.thinking=true")
    if init == "base" or (init == "auto" and stage == "sft"):
        return config.model.path
    path = resolve(init)
    if init == "auto":
        path = str(Path(config.out, "sft", "best"))
    if not Path(path).is_dir():
        raise InputError(
            f"sft.stage={stage} starts from {path}, which does not exist; run sft.stage=sft first, "
            f"or set sft.init to a checkpoint folder or to base"
        )
    return path


def stage_config(config):
    """The configuration as this stage uses it, and its section `sft`."""
    sft = config.sft
    if sft.stage == "more":
        sft = replace(sft, steps=sft.more_steps)
    if sft.stage != "cold_start":
        # Plain answers do not depend on these settings, and neither should the run.
        plain = replace(config.data, thinking=False, think_format="tags", report_share=0.5)
        config = replace(config, data=plain)
    return config, sft


def stage_examples(config, examples):
    """cold_start trains on traces, mixed with plain answers; other stages on plain answers."""
    if config.sft.stage != "cold_start":
        return examples
    traced = [e for e in examples if e.thinking]
    if not traced:
        raise InputError(
            f"sft.stage=cold_start needs thinking traces; data.source={config.data.source} has none"
        )
    random = np.random.default_rng([config.seed, 11])
    plain = random.random(len(traced)) < PLAIN_SHARE
    mixed = []
    for example, is_plain in zip(traced, plain):
        if is_plain:
            example = replace(example, style="plain")
        mixed.append(example)
    return mixed


def load_studies(config, split):
    """The studies of a split, each as the examples that ask about it."""
    examples = data.load_split(config, split)
    examples = stage_examples(config, examples)
    return data.by_study(examples)


def local_studies(studies, config, step):
    """This process's share of a step: a function of seed and step, so that a run can resume."""
    sft = config.sft
    places = data.indices(len(studies), sft.batch_size, step, config.seed, sft.stage)
    local = places[rank() :: world_size()]
    return [studies[i] for i in local]


def train(config: Config, stop: StopRequest) -> Path | None:
    """Train one stage, or continue it. Returns its best checkpoint, or None if it was stopped."""
    config, sft = stage_config(config)
    run = Path(config.out, sft.stage)
    start = starting_point(config)
    open_run(run, config, ["model", "data", "sft"], sft.steps)
    if last_step(run) == sft.steps:
        return run / "best"
    studies = load_studies(config, "train")
    held_out = load_studies(config, "val")
    policy, optimizer, state = model.load_or_resume(run, config, start, sft)
    prepare_ranks(policy, studies)
    best = state.get("best", math.inf)
    log = Log(run, config, state["step"], sft.steps)
    size = sum(p.numel() for p in policy.parameters()) / 1e6
    print0(
        f"{run}: {sft.stage} of {size:.1f} M parameters on {len(studies)} studies, "
        f"steps {state['step']} to {sft.steps}"
    )

    # The images of all steps can be decoded ahead, because their order is known.
    steps = range(state["step"], sft.steps)
    batches = (local_studies(studies, config, step) for step in steps)
    policy.encode_ahead(study[0] for batch in batches for study in batch)
    # From state["step"] on, with a progress bar and a clock.
    for step in log.steps():
        local = local_studies(studies, config, step)
        encoded = encode_studies(policy, local)
        lr = learning_rate(step, sft.steps, sft.warmup, sft.lr)
        metrics = update(policy, optimizer, encoded, lr, sft.micro_batch)
        done = step + 1
        if not metrics["num_tokens"]:
            raise InputError(f"step {done}: none of its studies can be used (see above)")

        # Validate, log, save, and stop if asked to.
        validated = done % sft.eval_every == 0 or done == sft.steps
        is_best = False
        if validated:
            metrics["eval_loss"] = validation_loss(policy, held_out, sft.micro_batch)
            # The first counts as the best even if it is infinite.
            is_best = metrics["eval_loss"] < best or best == math.inf
            best = min(best, metrics["eval_loss"])
        log.metrics(done, metrics)
        stopping = stop.requested()
        if validated or stopping:
            save_checkpoint(run, done, policy, optimizer, is_best, best=best)
        if stopping and done < sft.steps:
            print0(f"{run}: stopped after step {done}; the same command continues from here")
            return None
    return run / "best"


def prepare_ranks(policy, studies):
    """With sharded weights, a process without work runs along on a prompt: the first usable."""
    if policy.sharded:
        usable = (e.prompt for study in studies for e in encode_studies(policy, [study]))
        policy.dummy_prompt = next(usable, None)


def train_up_to(config: Config, stage: str, stop: StopRequest) -> Path | None:
    """OUT/STAGE/best, trained first (and the stage before it) where it is missing or unfinished.

    None if it was stopped.
    """
    sft = replace(config.sft, stage=stage)
    config = replace(config, sft=sft)
    if stage != "sft" and config.sft.init == "auto":
        train_up_to(config, "sft", stop)
    return None if stop.requested() else train(config, stop)


def main():
    config, stop = start_training(__doc__)
    best = train(config, stop)
    if best:
        print0(f"done: {best}")
    stop.finish()


if __name__ == "__main__":
    run_main(main)
