"""How sharing the prompt pays, by prompt length, group size and completion length:  python benchmarks/scaling.py

Scoring with gradients (forward + backward) against plain rows, and sampling against transformers' `generate` on repeated
prompts, on the Qwen3-VL of common.py; a prompt is as long as its image makes it. The two ways alternate in one process; times
are medians, memory is the peak beyond what is loaded, in a process of its own.
"""
import argparse
import tempfile
from pathlib import Path

import torch
from transformers import GenerationConfig

from common import ROOT, data, machine, medians, model, own_process, peak_memory, questions, save_model

PROMPTS = 2
CASES = ["100 8 64", "300 8 64", "1000 8 64", "300 2 64", "300 4 64", "300 16 64", "300 8 16", "300 8 256"]


def prepare(length, group, new_tokens):
    """A policy, B prompts of about `length` tokens, and B x G random completions."""
    side = 28 * round((length - 36) ** 0.5)
    with tempfile.TemporaryDirectory() as folder:
        save_model(Path(folder), 2048, side)
        policy = model.load_policy(data.load_config(ROOT / "config.yaml", [
            f"model.path={folder}", f"model.min_pixels={side * side}", f"model.max_pixels={side * side}", "data.train_size=16"]))
    policy.stop_ids = policy.stop_ids[:0]                                 # every completion has its full length
    examples = questions(policy.config, PROMPTS, 0)
    generator = torch.Generator().manual_seed(0)
    rows = [[torch.randint(20, 700, (new_tokens,), generator=generator).to(policy.device) for _ in range(group)] for _ in examples]
    return policy, [policy.encode(e) for e in examples], rows


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


def sample(policy, prompts, group, uniform):
    with torch.no_grad():
        policy.decode_groups(prompts, group, uniform, 1.0)


def print_peak(length, group, new_tokens, shared):
    """MiB that scoring takes beyond what is loaded."""
    policy, prompts, rows = prepare(length, group, new_tokens)
    score(policy, prompts[:1], [rows[0][:1]], bool(shared))               # what is allocated once
    before, peak = peak_memory(lambda: score(policy, prompts, rows, bool(shared)))
    print(peak - before)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", default=CASES, metavar='"PROMPT G NEW"')
    parser.add_argument("--cycles", type=int, default=3)
    parser.add_argument("--peak", nargs=4, type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak:
        return print_peak(*args.peak)
    print(f"{machine()}; median of {args.cycles}; {PROMPTS} prompts\n")
    print("| prompt | G | new | score: plain, s | shared | plain, MiB | shared | sample: generate, s | ours |\n" + "|---" * 9 + "|")
    for length, group, new in (map(int, case.split()) for case in args.cases):
        case = length, group, new
        policy, prompts, rows = prepare(*case)
        plain, shared = medians([lambda s=s: score(policy, prompts, rows, s) for s in (False, True)], args.cycles)
        policy.shared, uniform = True, torch.rand(PROMPTS * group, new, dtype=torch.double).to(policy.device)
        theirs, ours = medians([lambda: generate(policy, prompts, group, new), lambda: sample(policy, prompts, group, uniform)], args.cycles)
        memory = [own_process(__file__, "--peak", *case, s)[0] for s in (0, 1)]
        print(f"| {prompts[0]['input_ids'].shape[1]} | {group} | {new} | {plain:.2f} | {shared:.2f} ({plain / shared:.1f}x) | {memory[0]:.0f} | "
              f"{memory[1]:.0f} ({memory[1] / memory[0]:.2f}) | {theirs:.2f} | {ours:.2f} ({theirs / ours:.1f}x) |", flush=True)


if __name__ == "__main__":
    main()
