"""Log-probabilities of a large vocabulary, forward and backward, without its logits:  python benchmarks/logprobs.py

The GRPO loss of N tokens from their hidden states: plain (log_softmax of all logits), ours in both forms, and what is
installed of TRL (selective log-softmax; chunked), Liger (chunked GRPO loss) and cut-cross-entropy (its torch path):
  pip install trl==1.16.0 && pip install --no-deps liger-kernel==0.8.5 cut-cross-entropy==25.1.1
Times are medians of turns in one process and ratios to plain; memory is the peak over what is loaded and the gradients, each in
a process of its own; errors are against float64 on the same inputs.
"""

import argparse
import importlib.util
import platform

import torch

from common import DEVICE, machine, medians, model, own_process, peak_memory

CASES = [
    "1024 512 32768 float32",
    "4096 512 32768 float32",
    "1024 2048 32768 float32",
    "1024 1024 151936 float32",
    "512 512 32768 bfloat16",
]
ROWS = 8  # completions: N / ROWS tokens each


def inputs(n, hidden, vocabulary, dtype):
    """Hidden states, head, targets; per token: advantage, old and reference log-probs."""
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(n, hidden, generator=generator)
    w = torch.randn(vocabulary, hidden, generator=generator) * 2 / hidden**0.5
    ids = torch.randint(vocabulary, (n,), generator=generator)
    h, w, ids = (
        t.to(DEVICE) for t in (h.to(getattr(torch, dtype)), w.to(getattr(torch, dtype)), ids)
    )
    with torch.no_grad():
        logp = model.fused_logprobs(h, w, ids)[0]
    noise = torch.randn(2, n, generator=generator).to(DEVICE)
    advantages = torch.randn(ROWS, generator=generator).to(DEVICE).repeat_interleave(n // ROWS)
    return (
        h.requires_grad_(),
        w.requires_grad_(),
        ids,
        advantages,
        logp + 0.1 * noise[0],
        logp + 0.1 * noise[1],
    )


def grpo(logp, old, ref, advantages, n, beta=0.04):
    ratio, gap = (logp - old).exp(), ref - logp
    return (
        -torch.min(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
        + beta * (gap.exp() - gap - 1)
    ).sum() / n


def ways(h, w, ids, advantages, old, ref):
    """{name: function that fills h.grad and w.grad and returns log-probs, or None where it keeps them to itself}"""
    n = len(ids)
    rows = ROWS, n // ROWS

    def finish(logp):
        grpo(logp.float().flatten(), old, ref, advantages, n).backward()
        return logp.detach().flatten()

    def plain():
        return finish((h @ w.T).float().log_softmax(-1).gather(1, ids[:, None])[:, 0])

    def fused():
        return finish(model.fused_logprobs(h, w, ids)[0])

    result = {"plain": plain, "fused_logprobs": fused}
    if importlib.util.find_spec("trl"):

        def selective():
            from trl.trainer.utils import selective_log_softmax

            return finish(selective_log_softmax((h @ w.T).view(*rows, -1), ids.view(rows)))

        def chunked():
            from trl.kernels.chunked_logprob import ChunkedLogProbFunction

            return finish(
                ChunkedLogProbFunction.apply(
                    h, w, None, ids, 1.0, 32768, None, 1.0, ("log_probs", "entropy")
                )[0]
            )

        result |= {"TRL selective": selective, "TRL chunked": chunked}
    if importlib.util.find_spec("liger_kernel"):

        def liger():
            from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

            loss = LigerFusedLinearGRPOLoss(
                beta=0.04, compiled=False, use_ref_model=True, chunk_size=1, loss_type="dapo"
            )
            loss(
                h.view(*rows, -1),
                w,
                ids.view(rows),
                torch.ones(rows, device=h.device),
                advantages.view(rows)[:, 0],
                ref_per_token_logps=ref.view(rows),
                old_per_token_logps=old.view(rows),
            )[0].backward()

        result["Liger"] = liger
    if importlib.util.find_spec("cut_cross_entropy"):

        def cut():
            return finish(
                -linear_cross_entropy()(h, w, ids, reduction="none", impl="torch_compile")
            )

        result["cut-cross-entropy"] = cut

    def fresh(way):
        def run():
            h.grad = w.grad = None
            return way()

        return run

    return {name: fresh(way) for name, way in result.items()}


def linear_cross_entropy():
    """cut-cross-entropy imports Triton on Linux even for its torch path; elsewhere it does without."""
    system, platform.system = platform.system, lambda: "Darwin"
    try:
        from cut_cross_entropy import linear_cross_entropy as function
    finally:
        platform.system = system
    return function


def print_peak(case, way):
    """MiB at the peak of one forward and backward, beyond what was loaded before and the gradients. The larger figure of two
    runs, the second without the head's gradient: the plain way meets its peak before it has that one."""
    n, hidden, vocabulary, dtype = case
    ways(*inputs(64, hidden, 512, dtype))[way]()  # imports, buffers that stay
    tensors, most = inputs(n, hidden, vocabulary, dtype), 0
    for trained in (True, False):
        tensors[1].requires_grad_(trained)
        before, peak = peak_memory(ways(*tensors)[way])
        grads = [t.grad for t in tensors[:2] if t.grad is not None]
        most = max(most, peak - before - sum(g.numel() * g.element_size() for g in grads) / 2**20)
        del grads
        tensors[0].grad = tensors[1].grad = None
    print(most)


def errors(n=512, hidden=256, vocabulary=8192):
    print(
        f"\nLargest error of log-probabilities, and of both gradients relative to their norms; N {n}, H {hidden}, V {vocabulary}\n"
    )
    print("| | float32 | gradients | bfloat16 | gradients |\n" + "|---" * 5 + "|")
    cells = {}
    for dtype in ("float32", "bfloat16"):
        h, w, *rest = inputs(n, hidden, vocabulary, dtype)
        exact = h.detach().double().requires_grad_(), w.detach().double().requires_grad_()
        wanted = (exact[0] @ exact[1].T).log_softmax(-1).gather(1, rest[0][:, None])[:, 0]
        grpo(wanted, *(t.double() for t in (rest[2], rest[3], rest[1])), n).backward()
        for name, way in ways(h, w, *rest).items():
            logp = way()
            off = "" if logp is None else f"{(logp.double() - wanted).abs().max():.1e}"
            grads = max(
                float((a.grad.double() - b.grad).norm() / b.grad.norm())
                for a, b in zip((h, w), exact)
            )
            cells.setdefault(name, []).extend([off, f"{grads:.1e}"])
    for name, row in cells.items():
        print(f"| {name} | {' | '.join(row)} |")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cases", nargs="*", default=CASES, metavar='"N HIDDEN VOCABULARY DTYPE"')
    parser.add_argument("--cycles", type=int, default=3)
    parser.add_argument(
        "--ways", help="only these, by the beginnings of their names, comma-separated (and plain)"
    )
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    args = parser.parse_args()
    cases = [(*map(int, case.split()[:3]), case.split()[3]) for case in args.cases]
    if args.peak:
        return print_peak(cases[0], args.peak)
    print(f"{machine()}; median of {args.cycles}")
    for case, text in zip(cases, args.cases):
        functions = {
            name: way
            for name, way in ways(*inputs(*case)).items()
            if not args.ways or name.startswith(("plain", *args.ways.split(",")))
        }
        seconds = medians(list(functions.values()), args.cycles)
        memory = [own_process(__file__, text, "--peak", name)[0] for name in functions]
        print(
            f"\nN {case[0]}, H {case[1]}, V {case[2]}, {case[3]}\n\n| | s | plain / this | MiB | of plain |\n"
            + "|---" * 5
            + "|"
        )
        for name, s, mib in zip(functions, seconds, memory):
            print(
                f"| {name} | {s:.2f} | {seconds[0] / s:.2f} | {mib:.0f} | {mib / memory[0]:.3f} |",
                flush=True,
            )
    if not args.ways:
        errors()


if __name__ == "__main__":
    main()
