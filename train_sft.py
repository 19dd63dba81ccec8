"""Supervised fine-tuning: reports and grounding, and the cold start that teaches thinking.

  python train_sft.py config.yaml                              # or torchrun --nproc_per_node 8 train_sft.py config.yaml
  python train_sft.py config.yaml sft.stage=more               # sft.more_steps on from the result: the control for GRPO
  python train_sft.py config.yaml sft.stage=cold_start data.thinking=true

Writes OUT/STAGE/: config.yaml, metrics.jsonl, step_N/ (Hugging Face folders), best -> lowest validation loss, last.
Started again, the same command continues from `last`.
"""

import dataclasses
import math
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import data
import eval as evaluation
import model
from data import InputError


def learning_rate(step, steps, warmup, peak):
    """Linear warm-up to `peak`, then cosine to zero."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def encode_studies(policy, studies):
    """(prompt up to the end of its images, rows of question and answer ids, lengths of the answers) of each usable study."""
    encoded = []
    for examples in studies:
        for first, prompt in policy.encode_all(examples[:1]):
            prefix, rest = policy.split_at_images(prompt)
            if not torch.equal(rest, policy.question_ids(first)):
                raise InputError(
                    f"the chat template of model.path={policy.config.model.path} does not end its images as expected"
                )
            pairs = [
                pair
                for _, pair in policy.encode_all(
                    examples, lambda e: (policy.question_ids(e), policy.encode_target(e))
                )
            ]
            if pairs:
                encoded.append(
                    (
                        prefix,
                        [torch.cat(pair) for pair in pairs],
                        [len(answer) for _, answer in pairs],
                    )
                )
    return encoded


def answer_tokens(studies):
    return sum(sum(lengths) for _, _, lengths in studies)


def sft_loss(policy, studies, n_tokens):
    """-sum of answer-token log-probabilities / n_tokens (of the whole step, all micro-batches and processes).

    studies: from encode_studies. Each image runs once for all questions about it; questions carry no loss.
    """
    prompts, rows, lengths = zip(*studies)
    logp, _, _ = policy.logprobs(prompts, rows, n_scored=sum(lengths, []))
    return -logp.sum() / n_tokens


@torch.no_grad()
def validation_loss(policy, studies, size):
    """Mean loss per answer token over `studies` (lists of examples), split over the processes."""
    total, count = 0.0, 0
    mine = studies[model.rank() :: model.world_size()]
    with policy.gathered():
        for i in range(0, len(mine), size):
            if some := encode_studies(policy, mine[i : i + size]):
                count += answer_tokens(some)
                total += float(sft_loss(policy, some, 1))
    totals = model.gather_objects((total, count))
    if not (count := sum(c for _, c in totals)):
        raise InputError("none of the validation studies can be used (see the messages above)")
    return sum(t for t, _ in totals) / count


def starting_point(config):
    """The checkpoint that the stage starts from; None is model.path itself."""
    stage, init = config.sft.stage, config.sft.init
    if stage == "cold_start" and not config.data.thinking:
        raise InputError("sft.stage=cold_start needs data.thinking=true")
    if init == "base" or init == "auto" and stage == "sft":
        return None
    path = Path(config.out, "sft", "best") if init == "auto" else Path(evaluation.resolve(init))
    if not path.is_dir():
        raise InputError(
            f"sft.stage={stage} starts from {path}, which does not exist; run sft.stage=sft first, or set "
            f"sft.init to a checkpoint folder or to base"
        )
    return path


def stage_examples(config, examples):
    """cold_start trains on traces, mixed with plain answers (sft.plain_share); the other stages on plain answers."""
    if config.sft.stage != "cold_start":
        return examples
    traced = [e for e in examples if e.thinking]
    if not traced:
        raise InputError(
            f"sft.stage=cold_start needs thinking traces; data.source={config.data.source} has none"
        )
    plain = np.random.default_rng([config.seed, 11]).random(len(traced)) < config.sft.plain_share
    return [dataclasses.replace(e, style="plain") if p else e for e, p in zip(traced, plain)]


def train(config, stop):
    """Trains one supervised stage, or continues it. Returns its best checkpoint, or None when asked to stop before the end."""
    if config.sft.stage != "cold_start":
        plain = dataclasses.replace(
            config.data, thinking=False, think_format="tags", report_share=0.5
        )
        config = dataclasses.replace(
            config, data=plain
        )  # settings that plain answers do not depend on
    run = Path(config.out, config.sft.stage)
    sft = (
        dataclasses.replace(config.sft, steps=config.sft.more_steps)
        if config.sft.stage == "more"
        else config.sft
    )
    start = starting_point(config)
    model.open_run(run, config, ["model", "data", "sft"])
    if model.last_step(run) >= sft.steps:
        return run / "best"
    studies, held_out = (
        data.by_study(stage_examples(config, data.load_split(config, split)))
        for split in ("train", "val")
    )
    policy, optimizers, state = model.resume(run, config, start, sft)
    best = state.get("best", math.inf)
    log = model.Log(run, state["step"], config)
    size = sum(p.numel() for p in policy.parameters()) / 1e6
    model.say(
        f"{run}: {sft.stage} of {size:.1f} M parameters on {len(studies)} studies, "
        f"steps {state['step']} to {sft.steps}"
    )
    if policy.sharded:
        usable = (
            dict(prompt) for study in studies for prompt, _, _ in encode_studies(policy, [study])
        )
        policy.spare = next(usable, None)
    bad = 0
    bar = tqdm(
        range(state["step"], sft.steps),
        run.name,
        initial=state["step"],
        total=sft.steps,
        disable=model.rank() != 0,
    )
    for step in bar:
        began = time.perf_counter()
        # Which studies, in which order: a pure function of seed and step, so that a resumed run goes on where it was.
        chosen = [
            studies[i]
            for i in data.indices(len(studies), sft.batch_size, step, config.seed, sft.stage)
        ]
        encoded = encode_studies(policy, chosen[model.rank() :: model.world_size()])
        n_tokens = sum(model.gather_objects(answer_tokens(encoded)))
        if not n_tokens:
            raise InputError(
                f"step {step + 1}: none of its {len(chosen)} studies can be used (see the messages above)"
            )
        loss_sum = 0.0
        for some in policy.together(
            [encoded[i : i + sft.micro_batch] for i in range(0, len(encoded), sft.micro_batch)]
        ):
            loss = sft_loss(policy, some, n_tokens)
            loss.backward()
            loss_sum += float(loss.detach())
        rate = learning_rate(step, sft.steps, sft.warmup, sft.lr)
        norm = model.optimizer_step(policy, optimizers, rate, sft.grad_clip)
        bad = model.bad_steps(bad, [norm], config, f"{run}, step {step + 1}")
        done = step + 1
        values = {
            "loss": sum(model.gather_objects(loss_sum)),
            "grad_norm": norm,
            "learning_rate": rate,
            "num_tokens": n_tokens,
            "step_time": time.perf_counter() - began,
        }
        stopping = bool(stop)
        improved = False
        if done % sft.eval_every == 0 or done == sft.steps:
            values["eval_loss"] = validation_loss(policy, held_out, sft.micro_batch)
            improved, best = (
                values["eval_loss"] < best or best == math.inf,
                min(best, values["eval_loss"]),
            )
        log.metrics(done, values)
        bar.set_postfix(loss=f"{values['loss']:.3f}", best=f"{best:.3f}")
        if improved or stopping or done % sft.save_every == 0 or done == sft.steps:
            model.save_checkpoint(run, done, policy, optimizers, improved, best=best)
        if stopping and done < sft.steps:
            bar.close()
            model.say(f"{run}: stopped after step {done}; the same command continues from here")
            return None
    return run / "best"


def trained(config, stage, stop):
    """OUT/STAGE/best, training it first (and the stage before it) where it is missing or unfinished; None when stopped."""
    config = dataclasses.replace(config, sft=dataclasses.replace(config.sft, stage=stage))
    if stage != "sft" and config.sft.init == "auto":
        trained(config, "sft", stop)
    return None if stop else train(config, stop)


def main():
    config, stop = model.start(__doc__)
    if best := train(config, stop):
        model.say(f"done: {best}")
    stop.finish()


if __name__ == "__main__":
    data.run_main(main)
