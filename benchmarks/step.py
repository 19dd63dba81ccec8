"""One GRPO step, ours against TRL's GRPOTrainer.

  python benchmarks/step.py            (pip install trl==1.16.0 accelerate datasets)

Prompts of one image and one question, 8 completions of 96 tokens each, a reference model, on the
same random Qwen3-VL: ours, ours without sharing prompts (model.shared_prefix=false), and TRL in
float32, with the same KL coefficient and no gradient checkpointing (which only costs time here),
otherwise with its defaults. The three take turns in one process. Every figure is a median. Peak
memory is that of a whole process, imports included.

The floor is the arithmetic that a step needs if nothing is done twice, at the rate of matrix
products measured in the same run.
"""

import argparse
import importlib.util
import os
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from common import (
    CUDA,
    DEVICE,
    machine,
    medians,
    model_config,
    now,
    own_process,
    peak_memory,
    print_head,
    questions,
    save_model,
)
from torch import Tensor, nn

import data
import model
import train_grpo

G, NEW = 8, 96
PHASES = ("generate", "reference", "old", "update")
KL_COEF, LR = 0.04, 1e-6


class Case(NamedTuple):
    prompts: int
    side: int  # of the image, in pixels
    words: int  # added to the question
    vocabulary: int
    updates: int  # per rollout


CASES = {
    "110": Case(4, 252, 0, 2048, 1),
    "110, two updates": Case(4, 252, 0, 2048, 2),
    "300": Case(4, 392, 68, 2048, 1),
    "110, V 151936": Case(2, 252, 0, 151936, 1),
}


def count_words(text: str) -> float:
    """The reward."""
    return float(len(text.split()))


# ------------------------------------------------------------------------------- ours


class Ours:
    """Our GRPO step, with its phases timed."""

    def __init__(self, folder: str, case: Case, shared: bool = True) -> None:
        settings = [
            f"model.shared_prefix={shared}",
            "data.train_size=64",
            f"grpo.prompts={case.prompts}",
            f"grpo.group_size={G}",
            "grpo.micro_tokens=100_000",
            f"grpo.sample_batch={case.prompts}",
            f"grpo.max_new_tokens={NEW}",
            "grpo.temperature=1",
            f"grpo.epochs={case.updates}",
            f"grpo.lr={LR}",
            "grpo.adv_norm=group",
            f"grpo.kl_coef={KL_COEF}",
            "grpo.freeze=[]",
        ]
        self.config = model_config(folder, case.side, *settings)
        self.policy = model.load_policy(self.config)
        self.reference = model.load_policy(self.config)
        self.policy.freeze(self.config.grpo.freeze)
        self.optimizer = model.Optimizer(self.policy, self.config.grpo.optimizer)
        # Nothing stops a completion before its full length.
        self.policy.stop_ids = self.policy.stop_ids[:0]
        self.examples = questions(self.config, case.prompts, case.words)
        self.steps = 0
        self.rollouts = []  # of the last step

    def step(self) -> dict[str, float]:
        """One step: {phase: seconds}."""
        grpo = self.config.grpo
        self.steps += 1
        laps = [now()]
        rollouts = self.policy.sample(self.examples, G, NEW, 1.0, (0, self.steps))
        laps.append(now())

        for rollout in rollouts:
            rollout.rewards = [count_words(text) for text in rollout.texts]
        train_grpo.assign_advantages(rollouts, self.config)
        train_grpo.record_logprobs(self.reference, rollouts, "reference", grpo)
        laps.append(now())

        for _ in range(grpo.epochs):
            train_grpo.update(self.policy, self.optimizer, rollouts, grpo)
        laps.append(now())

        self.rollouts = rollouts
        return dict(zip(("generate", "reference", "update"), np.diff(laps)))

    def run(self, steps: int) -> None:
        for _ in range(steps):
            self.step()


# ------------------------------------------------------------------------------- TRL


class TimedTrainer:
    """To be mixed into TRL's GRPOTrainer: adds up the seconds of its phases."""

    phases: dict[str, float]

    def timed(self, name: str, work: Callable, *args: Any, **options: Any) -> Any:
        start = now()
        result = work(*args, **options)
        self.phases[name] = self.phases.get(name, 0) + now() - start
        return result

    def _generate_single_turn(self, *args: Any, **options: Any) -> Any:
        return self.timed("generate", super()._generate_single_turn, *args, **options)

    def _get_per_token_logps_and_entropies(self, scored: Any, *args: Any, **options: Any) -> Any:
        name = "reference" if scored is self.ref_model else "old"
        if torch.is_grad_enabled():
            name = "forward"
        work = super()._get_per_token_logps_and_entropies
        return self.timed(name, work, scored, *args, **options)


class StepEnds:
    """To be mixed into TrainerCallback: calls after_step({phase: seconds}) between TRL's steps."""

    def __init__(self, phases: dict[str, float], updates: int, after_step: Callable) -> None:
        self.phases, self.updates, self.after_step = phases, updates, after_step

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.start = now()

    def on_step_end(self, _: Any, state: Any, *__: Any, **___: Any) -> None:
        if state.global_step % self.updates:
            return
        whole = now() - self.start
        before = sum(self.phases.get(name, 0) for name in PHASES[:3])
        self.after_step({**self.phases, "update": whole - before})
        self.phases.clear()
        self.start = now()


def trl_reward(completions: list, **_: Any) -> list[float]:
    return [count_words(turns[0]["content"]) for turns in completions]


def trl_trainer(folder: str, case: Case, steps: int, after_step: Callable) -> Any:
    """TRL's trainer on the same model, questions and images.

    after_step({phase: seconds}) is called between its steps.
    """
    os.environ["HF_HUB_OFFLINE"] = "1"
    from datasets import Dataset  # noqa: PLC0415

    # Here, as it would add to the memory of our own steps.
    from transformers import TrainerCallback  # noqa: PLC0415
    from trl import GRPOConfig, GRPOTrainer  # noqa: PLC0415

    class Trainer(TimedTrainer, GRPOTrainer):
        pass

    class Turns(StepEnds, TrainerCallback):
        pass

    ours = Ours(folder, case)
    rows = []
    for e in ours.examples:
        turns = [{"role": "user", "content": e.question}]
        rows.append({"prompt": turns, "image": data.open_images(e)[0]})

    phases = {}
    banned = ours.policy.banned.tolist()
    trainer = Trainer(
        model=folder,
        args=GRPOConfig(
            per_device_train_batch_size=case.prompts * G,
            num_iterations=case.updates,
            max_steps=steps * case.updates,
            generation_kwargs={"suppress_tokens": banned, "min_new_tokens": NEW},
            **trl_settings(),
        ),
        train_dataset=Dataset.from_list(rows * 4),
        processing_class=ours.policy.processor,
        reward_funcs=trl_reward,
        callbacks=[Turns(phases, case.updates, after_step)],
    )
    trainer.phases = phases
    return trainer


def trl_settings() -> dict[str, Any]:
    """What all cases have in common."""
    return dict(
        output_dir=tempfile.mkdtemp(),
        num_generations=G,
        max_completion_length=NEW,
        beta=KL_COEF,
        learning_rate=LR,
        gradient_checkpointing=False,
        use_cpu=not CUDA,
        bf16=False,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )


# ------------------------------------------------------------------------------- the floor


def linear_work(module: nn.Module) -> int:
    """Floating-point operations of its linear layers, for one token or patch."""
    layers = [m for m in module.modules() if isinstance(m, (nn.Linear, nn.Conv3d))]
    return 2 * sum(layer.weight.numel() for layer in layers)


def attention_work(text: Any, queries: float, keys: float) -> float:
    """Floating-point operations of attention in all layers of the language model."""
    width = text.num_attention_heads * text.head_dim
    return 4 * queries * keys * width * text.num_hidden_layers


def image_work(tower: nn.Module, config: Any, patches: int) -> float:
    """Floating-point operations of the vision tower on one image; 4 patches make a token."""
    mergers = linear_work(tower.merger) + linear_work(tower.deepstack_merger_list)
    layers = patches * (linear_work(tower) - mergers)
    attention = 4 * patches**2 * config.hidden_size * config.depth
    return layers + patches / 4 * mergers + attention


def step_work(ours: Ours, case: Case) -> float:
    """Floating-point operations that one step needs.

    Every prompt and image runs once per pass, and its G completions share it.
    """
    policy = ours.policy
    text = policy.model.config.text_config
    prompt = ours.rollouts[0].prompt
    n = len(prompt)
    patches = len(prompt.images["pixel_values"])
    image = image_work(policy.base.visual, policy.model.config.vision_config, patches)
    layers = linear_work(policy.base.language_model)
    head = 2 * policy.head.numel()

    # Of causal attention, half is needed.
    prefill = case.prompts * (image + n * layers + attention_work(text, n, n) / 2)
    row = (NEW - 1) * layers + NEW * head + attention_work(text, NEW, n + NEW / 2)
    sampling = prefill + case.prompts * G * row
    # The same products, all tokens at once. A backward takes twice as many as its forward.
    scoring = sampling
    return sampling + scoring + case.updates * 3 * scoring


def multiply(a: Tensor, b: Tensor, times: int) -> list[Tensor]:
    return [a @ b for _ in range(times)]


def matmul_rate() -> float:
    """Floating-point operations per second of a product as in this model's layers."""
    a = torch.randn(4096, 256, device=DEVICE)
    b = torch.randn(256, 768, device=DEVICE)
    times = 20
    (seconds,) = medians([partial(multiply, a, b, times)], 5)
    return 2 * a.numel() * b.shape[1] * times / seconds


# ------------------------------------------------------------------------------- comparing


class Comparison:
    """The ways on one case, in turns."""

    def __init__(self, folder: str, case: Case) -> None:
        self.folder, self.case = folder, case
        self.ours = {"shared": Ours(folder, case), "plain": Ours(folder, case, shared=False)}
        # {phase: seconds} of every turn of each way.
        self.times: dict[str, list[dict]] = {way: [] for way in self.ours}
        self.rates: list[float] = []

    def run(self, cycles: int) -> None:
        """One turn more than that: the first does not count."""
        if importlib.util.find_spec("trl"):
            self.times["TRL"] = []
            trl_trainer(self.folder, self.case, cycles + 1, self.turn_after_trl).train()
            return
        for _ in range(cycles + 1):
            self.turn()

    def turn(self) -> None:
        self.rates.append(matmul_rate())
        for way, ours in self.ours.items():
            self.times[way].append(ours.step())

    def turn_after_trl(self, phases: dict[str, float]) -> None:
        self.turn()
        self.times["TRL"].append(phases)

    def phases(self, way: str) -> np.ndarray:
        """Seconds (cycles, phases), 0 for a phase that the way does not have."""
        turns = self.times[way][1:]
        return np.array([seconds_of_phases(turn) for turn in turns])

    def whole(self, way: str) -> float:
        """Median seconds of a step."""
        return float(np.median(self.phases(way).sum(1)))


def seconds_of_phases(turn: dict[str, float]) -> list[float]:
    return [turn.get(name, 0.0) for name in PHASES]


def compare(folder: str, name: str, cycles: int) -> None:
    """Print the table of one case."""
    case = CASES[name]
    found = Comparison(folder, case)
    found.run(cycles)
    shared = found.ours["shared"]
    work = step_work(shared, case)
    rate = np.median(found.rates)
    floor = work / rate
    print(
        f"\n{name}: {len(shared.rollouts[0].prompt)} prompt tokens, {case.prompts} prompts, "
        f"{case.updates} updates; {work / 1e9:.0f} GFLOP at {rate / 1e9:.0f} GFLOP/s: "
        f"floor {floor:.2f} s\n"
    )
    print_head(
        f"| | {' | '.join(PHASES)} | step, s | step / ours | step / floor | tokens/s | peak MiB |"
    )
    tokens = case.prompts * G * NEW
    for way in found.times:
        medians_of_phases = np.median(found.phases(way), axis=0)
        phases = " | ".join(f"{seconds:.2f}" for seconds in medians_of_phases)
        whole = found.whole(way)
        (peak,) = own_process(__file__, "--peak", way, "--cases", name)
        print(
            f"| {way} | {phases} | {whole:.2f} | {whole / found.whole('shared'):.2f} "
            f"| {whole / floor:.2f} | {tokens / whole:.0f} | {peak:.0f} |",
            flush=True,
        )


def skip_turn(phases: dict[str, float]) -> None:
    """After a step of TRL, when it runs alone."""


def print_peak(folder: str, case: Case, way: str) -> None:
    """Print the MiB of this process at the peak of two steps."""
    if way == "TRL":
        work = trl_trainer(folder, case, 2, skip_turn).train
    else:
        work = partial(Ours(folder, case, way == "shared").run, 2)
    print(peak_memory(work)[1])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="*", default=list(CASES), choices=CASES)
    parser.add_argument("--cycles", type=int, default=5)
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    args = parser.parse_args()

    if args.peak:
        args.cases = args.cases[:1]
    else:
        print(f"{machine()}; median of {args.cycles}; G {G}, {NEW} new tokens")
    for name in args.cases:
        case = CASES[name]
        with tempfile.TemporaryDirectory() as folder:
            save_model(Path(folder), case.vocabulary, case.side)
            if args.peak:
                print_peak(folder, case, args.peak)
            else:
                compare(folder, name, args.cycles)


if __name__ == "__main__":
    main()
