"""A GRPO step at the real shape on one GPU: Qwen3-VL-2B, 16 prompts, 8 completions of 128 tokens.

  python benchmarks/gpu.py             (one GPU of 80 GB, at most 6 minutes)
  python benchmarks/gpu.py --tiny      (the same code with a tiny model, also on a CPU)

Weights are random, in bfloat16 with float32 masters, all trained. Each part prints its rows when it
is done, and all rows stand in one table at the end. What fails says so, and the others go on.
"""

import argparse
import copy
import dataclasses
import gc
import subprocess
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import transformers
from common import CUDA, DEVICE, ROOT, machine, now, print_head
from step import attention_work, image_work, linear_work

import data
import model
import train_grpo
from model import Policy
from runtime.config import Config, load_config

G = 8
GIB = 2**30
# Dense bfloat16, in TFLOP/s.
PEAK = {"H100": 989, "H200": 989, "A100": 312}
# What an H100 should reach.
WANTED = {
    "step, s": "3.0",
    "decode 128 rows, ms a token": "7.5",
    "head, bfloat16, ms": "150",
    "head, bfloat16, GiB": "6",
    "update, TFLOP/s": "200 or more",
    "peak, GiB": "60",
    "gap of log-probs, mean": "1.1e-2",
}


@dataclasses.dataclass
class Shape:
    prompts: int = 16
    new: int = 128
    side: int = 448
    words: int = 20  # added to the questions
    cycles: int = 3
    rows: tuple = (8, 64, 128, 256)
    head: tuple = (16384, 2048, 151936)  # tokens, width, vocabulary


TINY = Shape(2, 8, 112, 2, 1, (8, 16), (256, 64, 2048))
TEXT = dict(
    vocab_size=151936,
    hidden_size=2048,
    intermediate_size=6144,
    num_hidden_layers=28,
    num_attention_heads=16,
    num_key_value_heads=8,
    head_dim=128,
    tie_word_embeddings=True,
    max_position_embeddings=262144,
)
VISION = dict(
    depth=24,
    hidden_size=1024,
    intermediate_size=4096,
    num_heads=16,
    patch_size=16,
    out_hidden_size=2048,
    num_position_embeddings=2304,
    deepstack_visual_indexes=[5, 11, 17],
)


class Bench:
    """The model, its settings, and the rows that are measured."""

    def __init__(self, shape: Shape, tiny: bool) -> None:
        self.shape = shape
        self.rows: list[tuple[str, str]] = []
        side = {"min_pixels": shape.side**2, "max_pixels": shape.side**2}
        small, self.processor = model.build_tiny(0, side)
        config = copy.deepcopy(small.config)
        if not tiny:
            config.text_config.update(TEXT)
            config.text_config.rope_parameters |= {"mrope_section": [24, 20, 20]}
            config.vision_config.update(VISION)
            self.processor.image_processor.patch_size = 16
        torch.manual_seed(0)
        with torch.device(DEVICE):
            self.model = type(small)(config)
        self.model.generation_config = small.generation_config
        self.model.cpu()

    def config(self, *overrides: str) -> Config:
        shape = self.shape
        settings = [
            f"model.min_pixels={shape.side**2}",
            f"model.max_pixels={shape.side**2}",
            "model.precision=bfloat16",
            "model.gradient_checkpointing=true",
            "data.train_size=64",
            "data.tasks=[report]",
            f"grpo.prompts={shape.prompts}",
            f"grpo.group_size={G}",
            "grpo.micro_batch=8",
            f"grpo.max_new_tokens={shape.new}",
            "grpo.temperature=1",
            "grpo.freeze=[]",
        ]
        return load_config(ROOT / "config.yaml", [*settings, *overrides])

    def policy(self, *overrides: str) -> Policy:
        """A copy that nothing stops before the full length."""
        policy = Policy(copy.deepcopy(self.model), self.processor, self.config(*overrides))
        policy.stop_ids = policy.stop_ids[:0]
        return policy

    def examples(self, count: int) -> list[data.Example]:
        reports = data.load_split(self.config(), "train")
        more = " heart" * self.shape.words
        chosen = [reports[i % len(reports)] for i in range(count)]
        return [
            dataclasses.replace(e, id=f"{i}", question=e.question + more)
            for i, e in enumerate(chosen)
        ]

    def row(self, name: str, value: str) -> None:
        self.rows.append((name, value))
        print(f"{name}: {value}", flush=True)


def free() -> None:
    gc.collect()
    if CUDA:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak() -> str:
    return f"{torch.cuda.max_memory_allocated() / GIB:.1f}" if CUDA else "-"


def scoring_work(policy: Policy, prompt: Any, shape: Shape) -> float:
    """Floating-point operations of scoring all completions, each prompt and image once."""
    text = policy.model.config.text_config
    n = len(prompt)
    patches = len(prompt.images["pixel_values"])
    image = image_work(policy.base.visual, policy.model.config.vision_config, patches)
    layers = linear_work(policy.base.language_model)
    head = 2 * policy.head[0].numel()
    prompts = image + n * layers + attention_work(text, n, n) / 2
    attention = attention_work(text, shape.new, n + shape.new / 2)
    row = (shape.new - 1) * layers + shape.new * head + attention
    return shape.prompts * (prompts + G * row)


def step(bench: Bench) -> None:
    """A whole step, by part. The first, which captures the graphs, does not count."""
    shape = bench.shape
    policy, reference = bench.policy(), bench.policy().freeze_all()
    grpo = policy.config.grpo
    optimizer = model.Optimizer(policy, grpo.optimizer)
    examples = bench.examples(shape.prompts)
    times = []
    for cycle in range(shape.cycles + 1):
        if cycle == 1:
            free()
        laps = [now()]
        rollouts = policy.sample(examples, G, shape.new, 1.0, (0, cycle))
        laps.append(now())
        rng = np.random.default_rng(cycle)
        for r in rollouts:
            r.rewards = rng.random(G).tolist()
        train_grpo.assign_advantages(rollouts, policy.config)
        train_grpo.record_logprobs(reference, rollouts, "reference", grpo)
        laps.append(now())
        result = train_grpo.update(policy, optimizer, rollouts, 1e-6, grpo)
        laps.append(now())
        times.append(np.diff(laps))
    parts = np.median(times[1:], 0)
    bench.row("step, s", f"{parts.sum():.2f}")
    for name, seconds in zip(("generate", "reference", "update"), parts):
        bench.row(f"{name}, s", f"{seconds:.2f}")
    tokens = shape.prompts * G * shape.new
    bench.row("sampled tokens a second", f"{tokens / parts[0]:.0f}")
    rate = 3 * scoring_work(policy, rollouts[0].prompt, shape) / parts[2] / 1e12
    bench.row("update, TFLOP/s", f"{rate:.0f}")
    card = torch.cuda.get_device_name() if CUDA else ""
    best = next((value for name, value in PEAK.items() if name in card), None)
    bench.row("update, MFU", f"{rate / best:.0%}" if best else "-")
    bench.row("peak, GiB", peak())
    metrics = train_grpo.update_metrics([result])
    for kind in ("mean", "max"):
        bench.row(f"gap of log-probs, {kind}", f"{metrics[f'{train_grpo.GAP}/{kind}']:.1e}")


def decode(bench: Bench) -> None:
    """Milliseconds a token by number of rows: with graphs, the same launched, the plain loop."""
    shape = bench.shape
    policy = bench.policy().freeze_all()
    for rows in shape.rows:
        prompts = [policy.encode(e) for e in bench.examples(rows // G)]
        uniform = torch.rand(rows, shape.new, dtype=torch.double).to(policy.device)
        ways = {"": None}
        if rows == shape.rows[-2]:
            ways |= {", launched": False, ", plain loop": None}
        for name, graphs in ways.items():
            policy.decoder = None
            policy.shared = "plain" not in name
            seconds = decode_seconds(policy, prompts, uniform, graphs)
            bench.row(f"decode {rows} rows{name}, ms a token", f"{1e3 * seconds / shape.new:.2f}")
    policy.shared = True


@torch.no_grad()
def decode_seconds(
    policy: Policy, prompts: list, uniform: torch.Tensor, graphs: bool | None
) -> float:
    """Of the second of two runs, without the prefill."""
    times = []
    for _ in range(2):
        with policy.autocast():
            start = now()
            policy.prefill(prompts)
            prefilled = now() - start
            if graphs is not None and policy.decoder:
                policy.decoder.uses_graphs = graphs
            start = now()
            policy.decode_groups(prompts, uniform, 1.0)
            times.append(now() - start - prefilled)
    return times[-1]


def head(bench: Bench) -> None:
    """fused_logprobs forward and backward, with weights of both precisions."""
    n, width, vocabulary = bench.shape.head
    for dtype in (torch.bfloat16, torch.float32):
        free()
        hidden = torch.randn(n, width, device=DEVICE).to(dtype).requires_grad_()
        weight = (torch.randn(vocabulary, width, device=DEVICE) / width**0.5).requires_grad_()
        targets = torch.randint(vocabulary, (n,), device=DEVICE)
        before = torch.cuda.memory_allocated() if CUDA else 0
        times = []
        for _ in range(3):
            hidden.grad = weight.grad = None
            start = now()
            logp, _ = model.fused_logprobs(hidden, weight, targets)
            logp.sum().backward()
            times.append(now() - start)
        name = str(dtype).removeprefix("torch.")
        bench.row(f"head, {name}, ms", f"{1e3 * min(times):.0f}")
        if CUDA:
            gib = (torch.cuda.max_memory_allocated() - before) / GIB
            bench.row(f"head, {name}, GiB", f"{gib:.1f}")


def profile(bench: Bench) -> None:
    """The kernels of one micro-batch of the update."""
    policy = bench.policy()
    optimizer = model.Optimizer(policy, policy.config.grpo.optimizer)
    grpo = dataclasses.replace(policy.config.grpo, kl_coef=0.0)
    rollouts = policy.sample(bench.examples(grpo.micro_batch), G, bench.shape.new, 1.0)
    for r in rollouts:
        r.advantages = torch.randn(G)
    train_grpo.update(policy, optimizer, rollouts, 1e-6, grpo)
    activity = torch.profiler.ProfilerActivity
    activities = [activity.CUDA if CUDA else activity.CPU]
    with torch.profiler.profile(activities=activities) as found:
        train_grpo.update(policy, optimizer, rollouts, 1e-6, grpo)
        now()
    averages = found.key_averages()
    bench.row("launches of a micro-batch", str(sum(event.count for event in averages)))
    order = "self_cuda_time_total" if CUDA else "self_cpu_time_total"
    print(averages.table(sort_by=order, row_limit=10, max_name_column_width=60))


def attempt(work: Callable, bench: Bench) -> None:
    """One part. An error costs that part alone."""
    free()
    try:
        work(bench)
    except Exception as error:
        reason = str(error).splitlines() or [repr(error)]
        bench.row(work.__name__, f"failed: {type(error).__name__}: {reason[0]:.150}")


def commit() -> str:
    command = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip() or "no commit"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--profile", action="store_true", help="also list the slowest kernels")
    args = parser.parse_args()
    bench = Bench(TINY if args.tiny else Shape(), args.tiny)
    parts = [head, decode, step]
    if args.profile:
        parts.append(profile)
    for work in parts:
        attempt(work, bench)

    print(f"\n{machine()}, transformers {transformers.__version__}, commit {commit()}\n")
    print_head("| | measured | wanted on an H100 |")
    for name, value in bench.rows:
        print(f"| {name} | {value} | {WANTED.get(name, '')} |")


if __name__ == "__main__":
    main()
