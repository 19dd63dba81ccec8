"""One GRPO step, ours against TRL's GRPOTrainer:  python benchmarks/step.py          (pip install trl==1.16.0 accelerate datasets)

Prompts of one image and one question, 8 completions of 96 tokens each, a reference model, on the same random Qwen3-VL: ours,
ours without sharing prompts (model.shared_prefix=false), and TRL in float32, with the same KL coefficient and no gradient
checkpointing (which only costs time here), otherwise with its defaults. The three take turns in one process; every figure is a median. Peak memory is that of a whole process, imports included. The
floor is the arithmetic that a step needs if nothing is done twice, at the rate of matrix products measured in the same run.
"""

import argparse
import importlib.util
import os
import tempfile
from pathlib import Path

import numpy as np
import torch

from common import (
    CUDA,
    DEVICE,
    ROOT,
    data,
    machine,
    medians,
    model,
    now,
    own_process,
    peak_memory,
    questions,
    save_model,
)

import train_grpo

G, NEW = 8, 96
# name: prompts, side of the image in pixels, words added to the question, vocabulary, updates per rollout
CASES = {
    "110": (4, 252, 0, 2048, 1),
    "110, two updates": (4, 252, 0, 2048, 2),
    "300": (4, 392, 68, 2048, 1),
    "110, V 151936": (2, 252, 0, 151936, 1),
}
PHASES = ["generate", "reference", "old", "update"]


class Ours:
    def __init__(self, folder, case, shared=True):
        prompts, side, words, _, updates = case
        self.config = data.load_config(
            ROOT / "config.yaml",
            [
                f"model.path={folder}",
                f"model.min_pixels={side * side}",
                f"model.max_pixels={side * side}",
                f"model.shared_prefix={shared}",
                "data.train_size=64",
                f"grpo.prompts={prompts}",
                f"grpo.group_size={G}",
                f"grpo.micro_batch={prompts}",
                f"grpo.sample_batch={prompts}",
                f"grpo.max_new_tokens={NEW}",
                "grpo.temperature=1",
                f"grpo.epochs={updates}",
                "grpo.lr=1e-6",
                "grpo.adv_norm=group",
                "grpo.kl_coef=0.04",
                "grpo.freeze=[]",
            ],
        )
        self.policy, self.reference = model.load_policy(self.config), model.load_policy(self.config)
        self.policy.freeze(self.config.grpo.freeze)
        self.optimizer = model.Optimizer(self.policy, self.config.grpo.optimizer)
        self.policy.stop_ids = self.policy.stop_ids[:0]  # every completion has its full length
        self.examples = questions(self.config, prompts, words)
        self.steps = 0

    def step(self):
        """{phase: seconds}"""
        grpo, self.steps, laps = self.config.grpo, self.steps + 1, [now()]
        rollouts = self.policy.sample(self.examples, G, NEW, 1.0, (0, self.steps))
        laps.append(now())
        for r in rollouts:
            r.rewards = [float(len(text.split())) for text in r.texts]
        train_grpo.assign_advantages(rollouts, self.config)
        train_grpo.record_logprobs(self.reference, rollouts, "reference", grpo)
        laps.append(now())
        for _ in range(grpo.epochs):
            train_grpo.update(self.policy, self.optimizer, rollouts, 1e-6, grpo)
        laps.append(now())
        self.rollouts = rollouts
        return dict(zip(("generate", "reference", "update"), np.diff(laps)))


def trl_trainer(folder, case, steps, after_step):
    """TRL's trainer on the same model, questions and images. after_step({phase: seconds}) is called between its steps."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    prompts, *_, updates = case
    ours = Ours(folder, case)
    rows = [
        {"prompt": [{"role": "user", "content": e.question}], "image": data.open_images(e)[0]}
        for e in ours.examples
    ]
    phases = {}

    class Timed(GRPOTrainer):
        def timed(self, name, work, *args, **options):
            start = now()
            result = work(*args, **options)
            phases[name] = phases.get(name, 0) + now() - start
            return result

        def _generate_single_turn(self, *args, **options):
            return self.timed("generate", super()._generate_single_turn, *args, **options)

        def _get_per_token_logps_and_entropies(self, which, *args, **options):
            name = (
                "forward"
                if torch.is_grad_enabled()
                else "reference"
                if which is self.ref_model
                else "old"
            )
            return self.timed(
                name, super()._get_per_token_logps_and_entropies, which, *args, **options
            )

    class Turns(TrainerCallback):
        def on_train_begin(self, *_, **__):
            self.start = now()

        def on_step_end(self, _, state, *__, **___):
            if state.global_step % updates == 0:
                whole = now() - self.start
                after_step({**phases, "update": whole - sum(phases.get(p, 0) for p in PHASES[:3])})
                phases.clear()
                self.start = now()

    settings = GRPOConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=prompts * G,
        num_generations=G,
        max_completion_length=NEW,
        beta=0.04,
        num_iterations=updates,
        learning_rate=1e-6,
        gradient_checkpointing=False,
        use_cpu=not CUDA,
        bf16=False,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        max_steps=steps * updates,
        generation_kwargs={"suppress_tokens": ours.policy.banned.tolist(), "min_new_tokens": NEW},
    )
    return Timed(
        model=str(folder),
        args=settings,
        train_dataset=Dataset.from_list(rows * 4),
        processing_class=ours.policy.processor,
        reward_funcs=lambda completions, **_: [
            float(len(c[0]["content"].split())) for c in completions
        ],
        callbacks=[Turns()],
    )


def arithmetic(ours, case):
    """Floating-point operations that one step needs when every prompt and image runs once per pass and G completions share it."""
    policy, (prompts, *_, updates) = ours.policy, case
    text, vision = policy.base.language_model, policy.base.visual
    shape, v = policy.model.config.text_config, policy.model.config.vision_config
    prompt = ours.rollouts[0].prompt
    n, patches, rows = len(prompt), len(prompt.images["pixel_values"]), prompts * G

    def linear(module):
        return 2 * sum(
            m.weight.numel()
            for m in module.modules()
            if isinstance(m, (torch.nn.Linear, torch.nn.Conv3d))
        )

    def attention(queries, keys):
        return (
            4
            * queries
            * keys
            * shape.num_attention_heads
            * shape.head_dim
            * shape.num_hidden_layers
        )

    mergers = linear(vision.merger) + linear(vision.deepstack_merger_list)
    image = (
        patches * (linear(vision) - mergers)
        + patches / 4 * mergers
        + 4 * patches**2 * v.hidden_size * v.depth
    )
    layers, head = linear(text), 2 * policy.head[0].numel()
    prefill = prompts * (image + n * layers + attention(n, n) / 2)
    decode = rows * ((NEW - 1) * layers + NEW * head + attention(NEW, n + NEW / 2))
    score = prefill + decode  # the same products, all tokens at once
    return prefill + decode + score + updates * 3 * score


def matmul_rate():
    """Floating-point operations per second of (4096, 256) @ (256, 768), as in this model's layers."""
    a, b = torch.randn(4096, 256, device=DEVICE), torch.randn(256, 768, device=DEVICE)
    return 2 * a.numel() * b.shape[1] * 20 / medians([lambda: [a @ b for _ in range(20)]], 5)[0]


def print_peak(folder, case, way):
    if way == "TRL":
        trainer = trl_trainer(folder, case, 2, lambda _: None)
        print(peak_memory(trainer.train)[1])
    else:
        ours = Ours(folder, case, way == "shared")
        print(peak_memory(lambda: [ours.step() for _ in range(2)])[1])


def compare(folder, name, cycles):
    case, trl = CASES[name], bool(importlib.util.find_spec("trl"))
    ours = {"shared": Ours(folder, case), "plain": Ours(folder, case, shared=False)}
    times, rates = {way: [] for way in (*ours, *["TRL"] * trl)}, []

    def turn(trl_phases=None):
        rates.append(matmul_rate())
        for way, one in ours.items():
            times[way].append(one.step())
        if trl_phases:
            times["TRL"].append(trl_phases)

    if trl:
        trl_trainer(folder, case, cycles + 1, turn).train()
    else:
        for _ in range(cycles + 1):
            turn()
    whole = {
        way: np.median([sum(t.get(p, 0) for p in PHASES) for t in some[1:]])
        for way, some in times.items()
    }
    needed, rate = arithmetic(ours["shared"], case), np.median(rates)
    floor, tokens = needed / rate, case[0] * G * NEW
    print(
        f"\n{name}: {len(ours['shared'].rollouts[0].prompt)} prompt tokens, {case[0]} prompts, {case[4]} updates; "
        f"{needed / 1e9:.0f} GFLOP at {rate / 1e9:.0f} GFLOP/s: floor {floor:.2f} s\n"
    )
    print(
        f"| | {' | '.join(PHASES)} | step, s | step / ours | step / floor | tokens/s | peak MiB |\n"
        + "|---" * 10
        + "|"
    )
    for way, some in times.items():
        phases = " | ".join(f"{np.median([t.get(p, 0) for t in some[1:]]):.2f}" for p in PHASES)
        peak = own_process(__file__, "--peak", way, "--cases", name)[0]
        print(
            f"| {way} | {phases} | {whole[way]:.2f} | {whole[way] / whole['shared']:.2f} | {whole[way] / floor:.2f} | "
            f"{tokens / whole[way]:.0f} | {peak:.0f} |",
            flush=True,
        )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="*", default=list(CASES), choices=CASES)
    parser.add_argument("--cycles", type=int, default=5)
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not args.peak:
        print(f"{machine()}; median of {args.cycles}; G {G}, {NEW} new tokens")
    for name in args.cases:
        with tempfile.TemporaryDirectory() as folder:
            save_model(Path(folder), CASES[name][3], CASES[name][1])
            if args.peak:
                return print_peak(folder, CASES[name], args.peak)
            compare(folder, name, args.cycles)


if __name__ == "__main__":
    main()
