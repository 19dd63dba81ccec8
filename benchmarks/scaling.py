"""How sharing the prompt pays, by prompt length, group size and completion length:  python benchmarks/scaling.py

Scoring with gradients (forward + backward) against plain rows, and sampling against transformers' `generate` on repeated
prompts, on the Qwen3-VL of common.py; a prompt is as long as its image makes it. The two ways alternate in one process; times
are medians, memory is the peak beyond what is loaded, in a process of its own.

  python benchmarks/scaling.py --processes 1 2          # GRPO steps of config.yaml on one and on two processes of one thread each
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from transformers import GenerationConfig

from common import (
    ROOT,
    data,
    machine,
    medians,
    model,
    own_process,
    peak_memory,
    questions,
    save_model,
)

PROMPTS = 2
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


def prepare(length, group, new_tokens):
    """A policy, B prompts of about `length` tokens, and B x G random completions."""
    side = 28 * round((length - 36) ** 0.5)
    with tempfile.TemporaryDirectory() as folder:
        save_model(Path(folder), 2048, side)
        policy = model.load_policy(
            data.load_config(
                ROOT / "config.yaml",
                [
                    f"model.path={folder}",
                    f"model.min_pixels={side * side}",
                    f"model.max_pixels={side * side}",
                    "data.train_size=16",
                ],
            )
        )
    policy.stop_ids = policy.stop_ids[:0]  # every completion has its full length
    examples = questions(policy.config, PROMPTS, 0)
    generator = torch.Generator().manual_seed(0)
    rows = [
        [
            torch.randint(20, 700, (new_tokens,), generator=generator).to(policy.device)
            for _ in range(group)
        ]
        for _ in examples
    ]
    return policy, [policy.encode(e) for e in examples], rows


def score(policy, prompts, rows, shared):
    policy.shared = shared
    logp, _, _ = policy.logprobs(prompts, rows)
    logp.sum().backward()
    policy.model.zero_grad()


def generate(policy, prompts, group, new_tokens):
    """transformers' own sampling, the prompts repeated for every completion."""
    tokens, images = policy.batch([p for p in prompts for _ in range(group)])
    config = GenerationConfig(
        do_sample=True,
        top_k=0,
        top_p=1.0,
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        pad_token_id=policy.tokenizer.pad_token_id,
    )
    with torch.no_grad():
        policy.model.generate(**tokens, **images, generation_config=config)


def sample(policy, prompts, group, uniform):
    with torch.no_grad():
        policy.decode_groups(prompts, group, uniform, 1.0)


def print_peak(length, group, new_tokens, shared):
    """MiB that scoring takes beyond what is loaded."""
    policy, prompts, rows = prepare(length, group, new_tokens)
    score(policy, prompts[:1], [rows[0][:1]], bool(shared))  # what is allocated once
    before, peak = peak_memory(lambda: score(policy, prompts, rows, bool(shared)))
    print(peak - before)


def step_time(processes, parallel, steps):
    """Median seconds of a GRPO step on so many processes, the first step left out."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node",
            str(processes),
            str(ROOT / "train_grpo.py"),
            str(ROOT / "config.yaml"),
            f"out={folder}",
            f"model.parallel={parallel}",
            "grpo.init=base",
            f"grpo.steps={steps + 1}",
            "eval.limit=1",
            "data.train_size=200",
            "data.val_size=2",
            "data.test_size=2",
            "grpo.micro_batch=6",
        ]
        subprocess.run(
            command, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True, capture_output=True
        )
        rows = [
            json.loads(line)
            for line in Path(folder, "grpo", "metrics.jsonl").read_text().splitlines()
        ]
    return float(np.median([row["step_time"] for row in rows[1:]]))


def efficiency(counts, cycles):
    print(
        "| processes | parallel | s per step | speed against one | efficiency |\n"
        + "|---" * 5
        + "|"
    )
    ways = [(1, "replicate")] + [
        (n, parallel) for n in counts if n > 1 for parallel in ("replicate", "shard")
    ]
    times = {way: [] for way in ways}
    for _ in range(cycles):  # in turns
        for way in ways:
            times[way].append(step_time(*way, 3))
    alone = np.median(times[1, "replicate"])
    for (n, parallel), some in times.items():
        speed = alone / np.median(some)
        print(
            f"| {n} | {parallel} | {np.median(some):.2f} | {speed:.2f} | {speed / n:.2f} |",
            flush=True,
        )


def main():
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
        return print_peak(*args.peak)
    print(f"{machine()}; median of {args.cycles}; {PROMPTS} prompts\n")
    if args.processes:
        return efficiency(args.processes, args.cycles)
    print(
        "| prompt | G | new | score: plain, s | shared | plain, MiB | shared | sample: generate, s | ours |\n"
        + "|---" * 9
        + "|"
    )
    for length, group, new in (map(int, case.split()) for case in args.cases):
        case = length, group, new
        policy, prompts, rows = prepare(*case)
        plain, shared = medians(
            [lambda s=s: score(policy, prompts, rows, s) for s in (False, True)], args.cycles
        )
        policy.shared, uniform = (
            True,
            torch.rand(PROMPTS * group, new, dtype=torch.double).to(policy.device),
        )
        theirs, ours = medians(
            [
                lambda: generate(policy, prompts, group, new),
                lambda: sample(policy, prompts, group, uniform),
            ],
            args.cycles,
        )
        memory = [own_process(__file__, "--peak", *case, s)[0] for s in (0, 1)]
        print(
            f"| {len(prompts[0])} | {group} | {new} | {plain:.2f} | {shared:.2f} ({plain / shared:.1f}x) | {memory[0]:.0f} | "
            f"{memory[1]:.0f} ({memory[1] / memory[0]:.2f}) | {theirs:.2f} | {ours:.2f} ({theirs / ours:.1f}x) |",
            flush=True,
        )


if __name__ == "__main__":
    main()
