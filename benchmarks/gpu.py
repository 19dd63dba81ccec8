"""One GPU in one table: a GRPO step of a random Qwen3-VL-2B, its decoder, its head, and TRL.

  python benchmarks/gpu.py             at most 6 minutes on one H100
  python benchmarks/gpu.py --tiny      the same code on a tiny model, to try it on a CPU (no graphs)

A step: 16 prompts of 257 tokens (an image of 200,000 pixels takes 210 of them), 8 completions of
128 tokens that nothing stops, bfloat16, full fine-tuning, one reference model. TRL's GRPOTrainer
takes part if it is installed (trl==1.16.0 accelerate datasets).

Times are medians after a warm-up, in which kernels are loaded and CUDA graphs captured. The slow
ways to decode run once after theirs. Rows are printed as they are measured, and the whole table at
the end. A part that fails, or that comes too late, leaves one line in the table.

Arithmetic counts what a step needs if nothing is done twice: one pass over each prompt, and nothing
that gradient checkpointing repeats. MFU (model FLOP utilisation) is its share of the card's peak.
"""

import argparse
import gc
import importlib.metadata
import importlib.util
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from common import (
    CUDA,
    DEVICE,
    ROOT,
    build_model,
    machine,
    medians,
    model_config,
    now,
    peak_memory,
    print_head,
    questions,
)
from step import (
    StepEnds,
    TimedTrainer,
    attention_work,
    image_work,
    linear_work,
    seconds_of_phases,
    trl_reward,
    trl_settings,
)
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

import data
import model
import train_grpo
from data import Example
from fast.shared_decode import SharedDecoder, shared_decode
from model import Policy, Prompt
from runtime.config import Config
from runtime.metrics import GAP, update_metrics

MINUTES = 5.5  # of measuring; the imports come before
G = 8
GIB = 2**10  # in MiB
# Dense bfloat16, TFLOP/s, by a part of the card's name.
PEAKS = {"H100 80GB HBM3": 989, "H200": 989, "A100": 312}
PHASES = ("generate", "reference", "update")
# The settings that the wanted figures are for, and others that repeat nothing in the backward: 8, 2
# and 4 prompts of 257 tokens with 8 x 128 new ones.
BEST = ["grpo.micro_tokens=10500", "model.gradient_checkpointing=true"]
OTHERS = [
    ["grpo.micro_tokens=2600", "model.gradient_checkpointing=false"],
    ["grpo.micro_tokens=5200", "model.gradient_checkpointing=false"],
]
TRL = "TRL without vLLM"


class Sizes(NamedTuple):
    """The shape of what is measured."""

    text: dict  # of the model, see common.build_model
    vision: dict
    rope: dict
    side: int  # of an image, in pixels
    words: int  # added to each question
    prompts: int  # of a step
    new_tokens: int
    rows: tuple[int, ...]  # decoded together, and by the plain loop
    rows_plain: tuple[int, ...]
    head: tuple[int, int, int]  # N, H, V
    turns: int  # that a median is of


QWEN3_VL_2B = Sizes(
    text=dict(
        vocab_size=151_936,
        hidden_size=2048,
        intermediate_size=6144,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=True,
    ),
    vision=dict(
        depth=24,
        hidden_size=1024,
        intermediate_size=4096,
        num_heads=16,
        patch_size=16,
        out_hidden_size=2048,
        num_position_embeddings=2304,
        deepstack_visual_indexes=[5, 11, 17],
    ),
    rope={"mrope_section": [24, 20, 20], "rope_theta": 5e6},
    side=448,
    words=20,
    prompts=16,
    new_tokens=128,
    rows=(8, 64, 128, 256),
    rows_plain=(128,),
    head=(16_384, 2048, 151_936),
    turns=5,
)
# The built-in model.
TINY = Sizes(
    text={},
    vision={},
    rope={},
    side=56,
    words=0,
    prompts=4,
    new_tokens=40,
    rows=(8, 16),
    rows_plain=(16,),
    head=(256, 64, 2048),
    turns=2,
)


# ------------------------------------------------------------------------------- the table


class Report:
    """The rows of the table so far, and the time that is left."""

    def __init__(self, minutes: float) -> None:
        self.rows = []
        self.end = time.monotonic() + 60 * minutes
        signal.signal(signal.SIGALRM, out_of_time)

    def add(self, name: str, measured: str, wanted: str = "") -> None:
        """Add a row and print it."""
        self.rows.append((name, measured, wanted))
        print(f"{name}: {measured}", flush=True)

    def run(self, name: str, part: Callable, *arguments: Any) -> None:
        """part(self, *arguments), which adds rows. An error takes one row, and others go on."""
        try:
            # What the part before has left.
            gc.collect()
            if CUDA:
                torch.cuda.empty_cache()
            left = self.end - time.monotonic()
            signal.alarm(max(1, int(left)))
            part(self, *arguments)
        except Exception as error:
            lines = str(error).strip().splitlines() or [""]
            self.add(name, f"failed: {type(error).__name__}: {lines[0][:150]}")
        finally:
            signal.alarm(0)

    def print_table(self, title: str) -> None:
        print(f"\n{title}\n")
        print_head("| | measured | wanted |")
        for row in self.rows:
            print(f"| {' | '.join(row)} |")


def out_of_time(*_: Any) -> None:
    raise TimeoutError("the time is over")


def versions() -> str:
    """What the figures depend on: card, libraries, commit."""
    parts = [machine(), f"transformers {transformers.__version__}"]
    if importlib.util.find_spec("trl"):
        parts.append(f"trl {importlib.metadata.version('trl')}")
    command = ["git", "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        commit = done.stdout.strip()
    except FileNotFoundError:
        commit = ""
    return ", ".join([*parts, f"commit {commit or 'unknown'}"])


def card_peak() -> float | None:
    """TFLOP/s that the card can reach, None for a card that is not in the list."""
    name = torch.cuda.get_device_name() if CUDA else ""
    return next((peak for card, peak in PEAKS.items() if card in name), None)


# ------------------------------------------------------------------------------- the step


def step_config(sizes: Sizes, *settings: str) -> Config:
    of_step = [
        "model.precision=bfloat16",
        "data.train_size=128",
        f"grpo.prompts={sizes.prompts}",
        f"grpo.group_size={G}",
        f"grpo.sample_batch={sizes.prompts}",
        f"grpo.max_new_tokens={sizes.new_tokens}",
        "grpo.temperature=1",
        "grpo.lr=1e-6",
        "grpo.kl_coef=0.01",
        "grpo.freeze=[]",
    ]
    return model_config("tiny", sizes.side, *of_step, *settings)


def random_policy(sizes: Sizes, config: Config) -> Policy:
    """The same random weights each time. No token ends a completion."""
    policy = model.Policy(*build_model(sizes.text, sizes.vision, sizes.rope, sizes.side), config)
    policy.stop_ids = torch.full_like(policy.stop_ids[:1], -1)
    return policy


class Training:
    """GRPO steps, with their phases timed."""

    def __init__(self, sizes: Sizes, *settings: str) -> None:
        self.config = step_config(sizes, *settings)
        self.policy = random_policy(sizes, self.config)
        self.policy.freeze(self.config.grpo.freeze)
        self.reference = random_policy(sizes, self.config).freeze_all()
        self.optimizer = model.Optimizer(self.policy, self.config.grpo.optimizer)
        self.examples = questions(self.config, sizes.prompts, sizes.words)
        self.rewards = np.random.default_rng(0)
        self.seconds = []  # (3,) of each step
        self.rollouts = []  # of the last step
        self.metrics = {}

    def step(self) -> None:
        grpo = self.config.grpo
        laps = [now()]
        step = len(self.seconds)
        (rollouts,) = train_grpo.sample_mini_batches(self.policy, self.examples, self.config, step)
        laps.append(now())

        for rollout in rollouts:
            rollout.rewards = self.rewards.random(G).tolist()
        train_grpo.assign_advantages(rollouts, self.config)
        train_grpo.record_logprobs(self.reference, rollouts, "reference", grpo)
        laps.append(now())

        update = train_grpo.update(self.policy, self.optimizer, rollouts, grpo)
        laps.append(now())

        self.seconds.append(np.diff(laps))
        self.rollouts = rollouts
        self.metrics = update_metrics([update])

    def run(self, steps: int) -> None:
        for _ in range(steps):
            self.step()

    def measure(self, turns: int) -> tuple[np.ndarray, float]:
        """Median seconds of the phases, (3,), and GiB at the peak, after a step of warm-up."""
        self.step()
        _, peak = peak_memory(partial(self.run, turns))
        return np.median(self.seconds[1:], axis=0), peak / GIB


def update_work(training: Training, sizes: Sizes) -> float:
    """Floating-point operations of an update. A backward takes twice as many as its forward."""
    policy = training.policy
    config = policy.model.config
    text = config.text_config
    prompt = training.rollouts[0].prompt
    n, new = len(prompt), sizes.new_tokens
    patches = len(prompt.images["pixel_values"])
    layers = linear_work(policy.base.language_model)
    head = 2 * policy.head.numel()

    # Of causal attention, half is needed. A last token predicts nothing.
    image = image_work(policy.base.visual, config.vision_config, patches)
    before = image + n * layers + attention_work(text, n, n) / 2
    row = (new - 1) * layers + new * head + attention_work(text, new, n + new / 2)
    return 3 * sizes.prompts * (before + G * row)


def measure_step(report: Report, sizes: Sizes) -> None:
    """The step by part, its arithmetic, its memory, and how well sampling and scoring agree."""
    training = Training(sizes, *BEST)
    seconds, peak = training.measure(sizes.turns)
    for phase, s in zip(PHASES, seconds):
        report.add(f"step: {phase}, s", f"{s:.2f}")
    whole = seconds.sum()
    tokens = sizes.prompts * G * sizes.new_tokens
    report.add("step: sum, s", f"{whole:.2f}", "<= 3.0")
    report.add("step: tokens/s", f"{tokens / whole:.0f}")

    rate = update_work(training, sizes) / seconds[-1] / 1e12
    most = card_peak()
    report.add("update: TFLOP/s", f"{rate:.3g}", ">= 200")
    report.add("update: MFU, %", f"{100 * rate / most:.3g}" if most else "-")
    report.add("step: peak memory, GiB", f"{peak:.1f}", "<= 60")

    mean, largest = training.metrics[f"{GAP}/mean"], training.metrics[f"{GAP}/max"]
    report.add("sampled and scored log-probs: mean gap", f"{mean:.2e}", "<= 1.1e-2")
    report.add("sampled and scored log-probs: largest gap", f"{largest:.2e}")


def measure_other_step(report: Report, sizes: Sizes, settings: list[str]) -> None:
    """The step with another setting, in one row."""
    training = Training(sizes, *settings)
    seconds, peak = training.measure(max(2, sizes.turns // 2))
    rate = update_work(training, sizes) / seconds[-1] / 1e12
    measured = f"{seconds.sum():.2f} s, update {seconds[-1]:.2f} s = {rate:.3g} TFLOP/s"
    report.add(step_name(settings), f"{measured}, peak {peak:.1f} GiB")


def step_name(settings: list[str]) -> str:
    return f"step with {', '.join(settings)}"


# ------------------------------------------------------------------------------- the decoder


def more_questions(config: Config, sizes: Sizes, count: int) -> list[Example]:
    """`count` questions, on the images of a step in turns."""
    examples = questions(config, sizes.prompts, sizes.words)
    return [examples[i % len(examples)] for i in range(count)]


@torch.no_grad()
def decode_seconds(policy: Policy, prompts: list[Prompt], length: int, graphs: bool) -> float:
    """Seconds in which 8 rows of each prompt get `length` tokens, after the prefill."""
    rows = G * len(prompts)
    uniform = torch.rand(rows, length, dtype=torch.float64, device=policy.device)
    with policy.autocast():
        prefill = policy.prefill(prompts)
        decode = policy.plain_decode
        if policy.shared:
            decode = partial(shared_decode, policy)
            if policy.decoder is None:
                policy.decoder = SharedDecoder(policy, prefill, uniform, 1.0)
                policy.decoder.uses_graphs = graphs and CUDA
        start = now()
        decode(prefill, uniform, 1.0)
        return now() - start


def measure_decode(
    report: Report, sizes: Sizes, name: str, rows: tuple[int, ...], graphs: bool, *settings: str
) -> None:
    """Milliseconds in which each of `rows` rows gets one more token."""
    policy = random_policy(sizes, step_config(sizes, *settings))
    examples = more_questions(policy.config, sizes, max(rows) // G)
    prompts = [policy.encode(example) for example in examples]
    turns = sizes.turns if graphs else 1
    for count in rows:
        # In buffers for more rows, it would be slower.
        policy.decoder = None
        work = partial(decode_seconds, policy, prompts[: count // G], sizes.new_tokens, graphs)
        # The first one captures the graphs.
        seconds = [work() for _ in range(turns + 1)][1:]
        # The first token comes from the prompts.
        ms = 1000 * np.median(seconds) / (sizes.new_tokens - 1)
        wanted = "<= 7.5 ms" if graphs and count == 128 else ""
        report.add(
            f"{name}, {count} rows", f"{ms:.2f} ms, {1000 * count / ms:.0f} tokens/s", wanted
        )


# ------------------------------------------------------------------------------- the head


def run_head(hidden: Tensor, weight: Tensor, targets: Tensor, banned: range) -> None:
    """Forward and backward. The gradients are freed."""
    logp, _ = model.fused_logprobs(hidden, weight, targets, 1.0, banned)
    logp.mean().backward()
    hidden.grad = weight.grad = None


def measure_head(report: Report, sizes: Sizes) -> None:
    """Log-probabilities with gradients. The weight is float32, as in training."""
    n, width, vocabulary = sizes.head
    weight = torch.randn(vocabulary, width, device=DEVICE).div_(width**0.5).requires_grad_()
    targets = torch.randint(vocabulary - 4, (n,), device=DEVICE)
    banned = range(vocabulary - 4, vocabulary)
    for dtype in (torch.bfloat16, torch.float32):
        hidden = torch.randn(n, width, device=DEVICE, dtype=dtype).requires_grad_()
        work = partial(run_head, hidden, weight, targets, banned)
        (seconds,) = medians([work], sizes.turns)
        before, peak = peak_memory(work)
        name = f"head, {str(dtype).removeprefix('torch.')} operands"
        half = dtype == torch.bfloat16
        report.add(f"{name}, ms", f"{1000 * seconds:.0f}", "<= 150" if half else "")
        # With the gradients.
        more = (peak - before) / GIB
        report.add(f"{name}, GiB over its inputs", f"{more:.1f}", "<= 6" if half else "")


# ------------------------------------------------------------------------------- TRL


def measure_trl(report: Report, sizes: Sizes) -> None:
    """Steps of TRL's GRPOTrainer with the same shape, generating with transformers."""
    if not importlib.util.find_spec("trl"):
        report.add(TRL, "not installed")
        return
    os.environ["HF_HUB_OFFLINE"] = "1"
    turns = []
    with tempfile.TemporaryDirectory() as folder:
        trainer = trl_trainer(folder, sizes, 3, turns.append)
        try:
            _, peak = peak_memory(trainer.train)
        finally:
            # If the time is over, the steps so far still count.
            if len(turns) > 1:
                seconds = np.median([seconds_of_phases(turn) for turn in turns[1:]], axis=0)
                generate, reference, old, update = seconds
                report.add(f"{TRL}: generate, s", f"{generate:.2f}")
                report.add(f"{TRL}: reference, s", f"{reference + old:.2f}")
                report.add(f"{TRL}: update, s", f"{update:.2f}")
                report.add(f"{TRL}: sum, s", f"{seconds.sum():.2f}")
    report.add(f"{TRL}: peak memory, GiB", f"{peak / GIB:.1f}")


def trl_trainer(folder: str, sizes: Sizes, steps: int, after_step: Callable) -> Any:
    """TRL's trainer on the same shape: one prompt per micro-batch, as more do not fit."""
    from datasets import Dataset  # noqa: PLC0415
    from transformers import TrainerCallback  # noqa: PLC0415
    from trl import GRPOConfig, GRPOTrainer  # noqa: PLC0415

    class Trainer(TimedTrainer, GRPOTrainer):
        pass

    class Turns(StepEnds, TrainerCallback):
        pass

    policy = random_policy(sizes, step_config(sizes))
    rows = []
    for e in questions(policy.config, sizes.prompts, sizes.words):
        chat = [{"role": "user", "content": e.question}]
        rows.append({"prompt": chat, "image": data.open_images(e)[0]})
    # Half the bytes to write.
    policy.model.to(torch.bfloat16)
    policy.save(Path(folder))
    processor, banned = policy.processor, policy.banned.tolist()
    del policy

    settings = trl_settings()
    settings |= dict(bf16=True, beta=0.01, model_init_kwargs={"dtype": "float32"})
    settings["per_device_train_batch_size"] = G
    settings["gradient_accumulation_steps"] = sizes.prompts
    settings["max_completion_length"] = sizes.new_tokens
    settings["generation_kwargs"] = {"suppress_tokens": banned, "min_new_tokens": sizes.new_tokens}

    phases = {}
    dataset = Dataset.from_list(rows * 4)
    turns = Turns(phases, 1, after_step)
    trainer = Trainer(
        model=folder,
        args=GRPOConfig(max_steps=steps, **settings),
        train_dataset=dataset,
        processing_class=processor,
        reward_funcs=trl_reward,
        callbacks=[turns],
    )
    trainer.phases = phases
    return trainer


# ------------------------------------------------------------------------------- a diagnosis


class NoOptimizer:
    """In place of an optimiser: the weights stay."""

    def step(self, lr: float) -> float:
        return lr


def print_kernels(report: Report, sizes: Sizes) -> None:
    """The kernels of one micro-batch of an update, forward and backward. On a CPU, operations."""
    training = Training(sizes, *BEST)
    training.optimizer = NoOptimizer()
    training.step()
    grpo = training.config.grpo
    micro_batch = training.policy.micro_batches(training.rollouts, grpo.micro_tokens)[0]
    work = partial(train_grpo.update, training.policy, training.optimizer, micro_batch, grpo)
    (seconds,) = medians([work], 1)
    activity = ProfilerActivity.CUDA if CUDA else ProfilerActivity.CPU
    with profile(activities=[activity]) as profiler:
        work()
        now()

    device = DeviceType.CUDA if CUDA else DeviceType.CPU
    microseconds = attrgetter("self_device_time_total" if CUDA else "self_cpu_time_total")
    kernels = [event for event in profiler.key_averages() if event.device_type == device]
    kernels.sort(key=microseconds, reverse=True)
    count = sum(kernel.count for kernel in kernels)
    ms = sum(map(microseconds, kernels)) / 1000
    print(
        f"\nOne micro-batch of an update ({len(micro_batch)} prompts): {1000 * seconds:.0f} ms; "
        f"{count} launches, whose kernels take {ms:.0f} ms\n"
    )
    print_head("| kernel | launches | ms |")
    for kernel in kernels[:10]:
        name = kernel.key.replace("|", " ")[:100]
        print(f"| {name} | {kernel.count} | {microseconds(kernel) / 1000:.1f} |")


# ------------------------------------------------------------------------------- all parts


def measure_all(report: Report, sizes: Sizes, parts: list[str]) -> None:
    """The parts in order of importance: if the time is over, the last ones are missing."""
    if "step" in parts:
        report.run("step", measure_step, sizes)
    if "decode" in parts:
        ours = "decoder with graphs"
        report.run(ours, measure_decode, sizes, ours, sizes.rows, True)
        eager = "decoder without graphs"
        report.run(eager, measure_decode, sizes, eager, sizes.rows, False)
        plain = "plain loop"
        settings = "model.shared_prefix=false"
        report.run(plain, measure_decode, sizes, plain, sizes.rows_plain, False, settings)
    if "head" in parts:
        report.run("head", measure_head, sizes)
    if "settings" in parts:
        for settings in OTHERS:
            report.run(step_name(settings), measure_other_step, sizes, settings)
    if "trl" in parts:
        report.run(TRL, measure_trl, sizes)


PARTS = ["step", "decode", "head", "settings", "trl"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tiny", action="store_true", help="a tiny model: figures mean nothing")
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS)
    parser.add_argument("--profile", action="store_true", help="in the end, print the kernels")
    args = parser.parse_args()

    title = versions()
    print(title, flush=True)
    sizes = TINY if args.tiny else QWEN3_VL_2B
    report = Report(MINUTES)
    measure_all(report, sizes, args.parts)
    report.print_table(title)
    if args.profile:
        report.run("kernels", print_kernels, sizes)


if __name__ == "__main__":
    main()
