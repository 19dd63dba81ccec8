"""How sharing the prompt pays, by prompt length, group size and completion length:  python benchmarks/scaling.py

Scoring with gradients (forward + backward) against plain rows, and sampling against `generate` on repeated prompts, with the
built-in tiny Qwen3-VL; a prompt is as long as its image makes it. The two ways alternate in one process; times are medians,
memory is the peak of a process of its own (CPU: growth of the resident set over the loaded model).
"""
import argparse
import platform
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from transformers import GenerationConfig

sys.path.insert(0, str(Path(__file__).parents[1]))
import data  # noqa: E402
import model  # noqa: E402

CASES = [(100, 8, 64), (300, 8, 64), (1000, 8, 64), (300, 2, 64), (300, 16, 64), (300, 8, 16), (300, 8, 256)]


def prepare(length, group, new_tokens, prompts=2):
    """A policy, B encoded prompts of about `length` tokens, and B x G random completions."""
    side = 28 * round((length - 15) ** 0.5)
    config = data.load_config(Path(__file__).parents[1] / "config.yaml", [
        f"model.min_pixels={side * side}", f"model.max_pixels={side * side}", "data.train_size=8"])
    policy = model.load_policy(config)
    policy.stop_ids = policy.stop_ids[:0]                                 # every completion has its full length
    examples = [e for e in data.load_split(config, "train") if e.task == "report"][:prompts]
    generator = torch.Generator().manual_seed(0)
    rows = [[torch.randint(20, 700, (new_tokens,), generator=generator).to(policy.device) for _ in range(group)] for _ in examples]
    return policy, examples, [policy.encode(e) for e in examples], rows


def score(policy, prompts, rows, shared):
    policy.shared = shared
    logp, _, _ = policy.logprobs(prompts, rows)
    logp.sum().backward()
    policy.model.zero_grad()


def generate(policy, prompts, group, new_tokens):
    """transformers' own sampling, the prompts repeated for every completion."""
    batch = model.collate([p for p in prompts for _ in range(group)])
    config = GenerationConfig(do_sample=True, top_k=0, top_p=1.0, max_new_tokens=new_tokens, min_new_tokens=new_tokens,
                              pad_token_id=policy.tokenizer.pad_token_id)
    with torch.no_grad():
        policy.model.generate(**batch, generation_config=config)


def seconds(work):
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def medians(works, cycles):
    """Median seconds of each function, taking turns; one unmeasured turn first."""
    times = [[seconds(work) for work in works] for _ in range(cycles + 1)][1:]
    return np.median(times, axis=0)


def peak_memory(case, shared):
    """MiB that scoring takes over the loaded model, measured in a fresh process."""
    out = subprocess.run([sys.executable, __file__, "--peak", *map(str, case), str(int(shared))], capture_output=True, text=True, check=True)
    return float(out.stdout.split()[-1])


def resident(key):
    return int(re.search(rf"{key}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 2**10


def print_peak(length, group, new_tokens, shared):
    policy, _, prompts, rows = prepare(length, group, new_tokens)
    score(policy, prompts[:1], [rows[0][:1]], bool(shared))               # what is allocated once
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        score(policy, prompts, rows, bool(shared))
        print((torch.cuda.max_memory_allocated() - before) / 2**20)
    else:
        Path("/proc/self/clear_refs").write_text("5")                     # Linux: forget the peak so far
        before = resident("VmRSS")
        score(policy, prompts, rows, bool(shared))
        print(resident("VmHWM") - before)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cycles", type=int, default=3)
    parser.add_argument("--peak", nargs=4, type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak:
        return print_peak(*args.peak)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.processor() or platform.machine()} CPU"
    print(f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}; 2 prompts; seconds (ratio), MiB\n")
    print("| prompt | G | new | score, plain | shared | MiB, plain | shared | generate | sample |\n" + "|---" * 9 + "|")
    for case in CASES:
        policy, examples, prompts, rows = prepare(*case)
        plain, shared = medians([lambda s=s: score(policy, prompts, rows, s) for s in (False, True)], args.cycles)
        policy.shared = True
        theirs, ours = medians([lambda: generate(policy, prompts, *case[1:]),
                                lambda: policy.sample(examples, case[1], case[2], 1.0)], args.cycles)
        memory = [peak_memory(case, s) for s in (False, True)]
        print(f"| {prompts[0]['input_ids'].shape[1]} | {case[1]} | {case[2]} | {plain:.2f} | {shared:.2f} ({plain / shared:.1f}x) | "
              f"{memory[0]:.0f} | {memory[1]:.0f} ({memory[1] / memory[0]:.2f}) | {theirs:.2f} | {ours:.2f} ({theirs / ours:.1f}x) |",
              flush=True)


if __name__ == "__main__":
    main()
