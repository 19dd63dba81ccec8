"""How sharing the prompt pays, by prompt length, group size and completion length.

  python benchmarks/scaling.py
  python benchmarks/scaling.py --processes 1 2

Scoring with gradients (forward + backward) against plain rows, and sampling against transformers'
`generate` on repeated prompts, on the Qwen3-VL of common.py. A prompt is as long as its image makes
it. The two ways alternate in one process. Times are medians, memory is the peak beyond what is
loaded, in a process of its own.

With --processes: GRPO steps of config.yaml on one and on two processes of one thread each.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import torch
from common import (
    ROOT,
    machine,
    medians,
    model_config,
    own_process,
    peak_memory,
    print_head,
    questions,
    save_model,
)
from torch import Tensor
from transformers import GenerationConfig

import model
from model import Policy, Prompt

PROMPTS = 2
# Prompt length, group size, new tokens.
CASES = [
    "100 8 64",
    "300 8 64",
    "1000 8 64",
    "300 2 64",
    "300 4 64",
    "300 16 64",
    "300 8 16",
    "300 8 256",
]


# ------------------------------------------------------------------------------- one process


def prepare(
    length: int, group: int, new_tokens: int
) -> tuple[Policy, list[Prompt], list[list[Tensor]]]:
    """A policy, B prompts of about `length` tokens, and G random completions of each."""
    # Beside the tokens of the image, a prompt has 36.
    side = 28 * round((length - 36) ** 0.5)
    with tempfile.TemporaryDirectory() as folder:
        save_model(Path(folder), 2048, side)
        policy = model.load_policy(model_config(folder, side, "data.train_size=16"))
    # Nothing stops a completion before its full length.
    policy.stop_ids = policy.stop_ids[:0]

    examples = questions(policy.config, PROMPTS, 0)
    generator = torch.Generator().manual_seed(0)
    completions = []
    for _ in examples:
        ids = [torch.randint(20, 700, (new_tokens,), generator=generator) for _ in range(group)]
        completions.append([row.to(policy.device) for row in ids])
    return policy, [policy.encode(e) for e in examples], completions


def score(
    policy: Policy, prompts: list[Prompt], completions: list[list[Tensor]], shared: bool
) -> None:
    """Forward and backward of the completions, sharing their prompts or in plain rows."""
    policy.shared = shared
    logp, _, _ = policy.logprobs(prompts, completions)
    logp.sum().backward()
    policy.model.zero_grad()


@torch.no_grad()
def generate(policy: Policy, prompts: list[Prompt], group: int, new_tokens: int) -> None:
    """transformers' own sampling, the prompts repeated for every completion."""
    copies = [p for p in prompts for _ in range(group)]
    inputs = policy.pad_prompts(copies)
    # The library finds the positions by itself.
    del inputs["position_ids"]
    for name in copies[0].images:
        inputs[name] = model.pad_images([p.images[name] for p in copies])
    config = GenerationConfig(
        do_sample=True,
        top_k=0,
        top_p=1.0,
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        pad_token_id=policy.tokenizer.pad_token_id,
    )
    policy.model.generate(**inputs, generation_config=config)


@torch.no_grad()
def sample(policy: Policy, prompts: list[Prompt], uniform: Tensor) -> None:
    """Our sampling with the random numbers uniform (R, T)."""
    policy.decode_groups(prompts, uniform, 1.0)


def print_peak(length: int, group: int, new_tokens: int, shared: bool) -> None:
    """Print the MiB that scoring takes beyond what is loaded."""
    policy, prompts, completions = prepare(length, group, new_tokens)
    # What is allocated once does not count.
    score(policy, prompts[:1], [completions[0][:1]], shared)
    before, peak = peak_memory(partial(score, policy, prompts, completions, shared))
    print(peak - before)


def compare(length: int, group: int, new_tokens: int, cycles: int) -> None:
    """Print one row of the table."""
    policy, prompts, completions = prepare(length, group, new_tokens)
    scoring = [partial(score, policy, prompts, completions, shared) for shared in (False, True)]
    plain, shared = medians(scoring, cycles)

    policy.shared = True
    uniform = torch.rand(PROMPTS * group, new_tokens, dtype=torch.double).to(policy.device)
    sampling = [
        partial(generate, policy, prompts, group, new_tokens),
        partial(sample, policy, prompts, uniform),
    ]
    theirs, ours = medians(sampling, cycles)

    case = length, group, new_tokens
    (plain_mib,) = own_process(__file__, "--peak", *case, 0)
    (shared_mib,) = own_process(__file__, "--peak", *case, 1)
    print(
        f"| {len(prompts[0])} | {group} | {new_tokens} "
        f"| {plain:.2f} | {shared:.2f} ({plain / shared:.1f}x) "
        f"| {plain_mib:.0f} | {shared_mib:.0f} ({shared_mib / plain_mib:.2f}) "
        f"| {theirs:.2f} | {ours:.2f} ({theirs / ours:.1f}x) |",
        flush=True,
    )


# ------------------------------------------------------------------------------- processes


def step_time(processes: int, parallel: str, steps: int) -> float:
    """Median seconds of a GRPO step on so many processes, the first step left out."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    script = [str(ROOT / "train_grpo.py"), str(ROOT / "config.yaml")]
    settings = [
        f"model.parallel={parallel}",
        "grpo.init=base",
        f"grpo.steps={steps + 1}",
        "eval.limit=1",
        "data.train_size=200",
        "data.val_size=2",
        "data.test_size=2",
        "grpo.micro_tokens=4200",
    ]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, *launcher, *script, f"out={folder}", *settings]
        subprocess.run(command, env=env, check=True, capture_output=True)
        lines = Path(folder, "grpo", "metrics.jsonl").read_text().splitlines()
    seconds = [json.loads(line)["step_time"] for line in lines]
    return float(np.median(seconds[1:]))


def print_efficiency(counts: list[int], cycles: int) -> None:
    """Print the table of so many processes, against one."""
    print_head("| processes | parallel | s per step | speed against one | efficiency |")
    ways = [(1, "replicate")]
    for n in counts:
        if n > 1:
            ways += [(n, "replicate"), (n, "shard")]

    # The ways take turns.
    times = {way: [] for way in ways}
    for _ in range(cycles):
        for way in ways:
            times[way].append(step_time(*way, 3))

    alone = np.median(times[1, "replicate"])
    for (n, parallel), seconds in times.items():
        median = np.median(seconds)
        speed = alone / median
        print(f"| {n} | {parallel} | {median:.2f} | {speed:.2f} | {speed / n:.2f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cases", nargs="*", default=CASES, metavar='"PROMPT G NEW"')
    parser.add_argument("--cycles", type=int, default=3)
    parser.add_argument(
        "--processes", nargs="*", type=int, help="parallel efficiency on so many processes instead"
    )
    parser.add_argument("--peak", nargs=4, type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()

    if args.peak:
        *case, shared = args.peak
        print_peak(*case, bool(shared))
        return
    print(f"{machine()}; median of {args.cycles}; {PROMPTS} prompts\n")
    if args.processes:
        print_efficiency(args.processes, args.cycles)
        return
    print_head(
        "| prompt | G | new | score: plain, s | shared | plain, MiB | shared "
        "| sample: generate, s | ours |"
    )
    for case in args.cases:
        compare(*map(int, case.split()), args.cycles)


if __name__ == "__main__":
    main()
