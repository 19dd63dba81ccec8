"""Log-probabilities of a large vocabulary, forward and backward, without its logits.

  python benchmarks/logprobs.py

The GRPO loss of N tokens from their hidden states: plain (log_softmax of all logits), ours, and
what is installed of TRL (selective log-softmax; chunked), Liger (chunked GRPO loss) and
cut-cross-entropy (its torch path):

  pip install trl==1.16.0
  pip install --no-deps liger-kernel==0.8.5 cut-cross-entropy==25.1.1

Times are medians of turns in one process, and ratios to plain. Memory is the peak over what is
loaded and the gradients, each in a process of its own. Errors are against float64 on the same
inputs. N tokens, H hidden width, V vocabulary.
"""

import argparse
import importlib.util
import platform
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from common import DEVICE, MIB, machine, medians, own_process, peak_memory, print_head
from torch import Tensor

from model import fused_logprobs

CASES = [
    "1024 512 32768 float32",
    "4096 512 32768 float32",
    "1024 2048 32768 float32",
    "1024 1024 151936 float32",
    "512 512 32768 bfloat16",
]
# Completions, of N / ROWS tokens each.
ROWS = 8
BETA = 0.04


@dataclass
class Inputs:
    """What the loss is computed of."""

    hidden: Tensor  # (N, H)
    weight: Tensor  # (V, H), the head
    ids: Tensor  # (N,)
    advantages: Tensor  # (N,), as are the next two
    old_logp: Tensor
    ref_logp: Tensor

    @property
    def rows(self) -> tuple[int, int]:
        """The shape of the tokens as completions."""
        return ROWS, len(self.ids) // ROWS


def make_inputs(n: int, hidden: int, vocabulary: int, dtype: str) -> Inputs:
    """Random inputs. The log-probabilities of the old policy and the reference lie around ours."""
    generator = torch.Generator().manual_seed(0)
    kind = getattr(torch, dtype)
    h = torch.randn(n, hidden, generator=generator)
    w = torch.randn(vocabulary, hidden, generator=generator) * 2 / hidden**0.5
    ids = torch.randint(vocabulary, (n,), generator=generator).to(DEVICE)
    h, w = h.to(kind).to(DEVICE), w.to(kind).to(DEVICE)

    with torch.no_grad():
        logp, _ = fused_logprobs(h, w, ids)
    noise = torch.randn(2, n, generator=generator).to(DEVICE)
    advantages = torch.randn(ROWS, generator=generator).to(DEVICE).repeat_interleave(n // ROWS)
    old_logp, ref_logp = logp + 0.1 * noise
    return Inputs(h.requires_grad_(), w.requires_grad_(), ids, advantages, old_logp, ref_logp)


def grpo_loss(logp: Tensor, old_logp: Tensor, ref_logp: Tensor, advantages: Tensor) -> Tensor:
    """The GRPO loss with k3, a mean over the tokens; all are (N,)."""
    ratio = (logp - old_logp).exp()
    gap = ref_logp - logp
    surrogate = torch.min(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    kl = gap.exp() - gap - 1
    return (-surrogate + BETA * kl).sum() / len(logp)


# ------------------------------------------------------------------------------- the ways
# Each fills hidden.grad and weight.grad, and returns the log-probabilities (N,), or None if it
# keeps them to itself.


def backward(x: Inputs, logp: Tensor) -> Tensor:
    """The loss of log-probabilities and its backward."""
    grpo_loss(logp.float().flatten(), x.old_logp, x.ref_logp, x.advantages).backward()
    return logp.detach().flatten()


def plain(x: Inputs) -> Tensor:
    logp = (x.hidden @ x.weight.T).float().log_softmax(-1)
    return backward(x, logp.gather(1, x.ids[:, None])[:, 0])


def fused(x: Inputs) -> Tensor:
    return backward(x, fused_logprobs(x.hidden, x.weight, x.ids)[0])


def trl_selective(x: Inputs) -> Tensor:
    from trl.trainer.utils import selective_log_softmax  # noqa: PLC0415

    logits = (x.hidden @ x.weight.T).view(*x.rows, -1)
    return backward(x, selective_log_softmax(logits, x.ids.view(x.rows)))


def trl_chunked(x: Inputs) -> Tensor:
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction  # noqa: PLC0415

    outputs = ("log_probs", "entropy")
    logp, *_ = ChunkedLogProbFunction.apply(
        x.hidden, x.weight, None, x.ids, 1.0, 32768, None, 1.0, outputs
    )
    return backward(x, logp)


def liger(x: Inputs) -> None:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss  # noqa: PLC0415

    loss_of = LigerFusedLinearGRPOLoss(
        beta=BETA, compiled=False, use_ref_model=True, chunk_size=1, loss_type="dapo"
    )
    loss, *_ = loss_of(
        x.hidden.view(*x.rows, -1),
        x.weight,
        x.ids.view(x.rows),
        torch.ones(x.rows, device=x.hidden.device),
        x.advantages.view(x.rows)[:, 0],
        ref_per_token_logps=x.ref_logp.view(x.rows),
        old_per_token_logps=x.old_logp.view(x.rows),
    )
    loss.backward()


def cut_cross_entropy(x: Inputs) -> Tensor:
    function = import_cut_cross_entropy()
    loss = function(x.hidden, x.weight, x.ids, reduction="none", impl="torch_compile")
    return backward(x, -loss)


def darwin() -> str:
    return "Darwin"


def import_cut_cross_entropy() -> Callable:
    """It imports Triton on Linux even for its torch path; elsewhere it does without."""
    system = platform.system
    platform.system = darwin
    try:
        from cut_cross_entropy import linear_cross_entropy  # noqa: PLC0415
    finally:
        platform.system = system
    return linear_cross_entropy


def installed_ways() -> dict[str, Callable]:
    ways = {"plain": plain, "fused_logprobs": fused}
    if importlib.util.find_spec("trl"):
        ways |= {"TRL selective": trl_selective, "TRL chunked": trl_chunked}
    if importlib.util.find_spec("liger_kernel"):
        ways["Liger"] = liger
    if importlib.util.find_spec("cut_cross_entropy"):
        ways["cut-cross-entropy"] = cut_cross_entropy
    return ways


def run(way: Callable, x: Inputs) -> Tensor | None:
    """One way, with fresh gradients."""
    x.hidden.grad = x.weight.grad = None
    return way(x)


# ------------------------------------------------------------------------------- measuring


def print_peak(n: int, hidden: int, vocabulary: int, dtype: str, way: Callable) -> None:
    """Print the MiB at the peak of one forward and backward, beyond what was loaded before and the
    gradients.

    The larger figure of two runs, the second without the head's gradient: the plain way meets its
    peak before it has that one.
    """
    # Imports, and buffers that stay.
    run(way, make_inputs(64, hidden, 512, dtype))

    x, most = make_inputs(n, hidden, vocabulary, dtype), 0
    for trained in (True, False):
        x.weight.requires_grad_(trained)
        before, peak = peak_memory(partial(run, way, x))
        grads = [t.grad for t in (x.hidden, x.weight) if t.grad is not None]
        size = sum(g.numel() * g.element_size() for g in grads) / MIB
        most = max(most, peak - before - size)
        del grads
        x.hidden.grad = x.weight.grad = None
    print(most)


def exact(x: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """The log-probabilities and the gradients of hidden states and head in float64."""
    hidden = x.hidden.detach().double().requires_grad_()
    weight = x.weight.detach().double().requires_grad_()
    logp = (hidden @ weight.T).log_softmax(-1).gather(1, x.ids[:, None])[:, 0]
    others = (t.double() for t in (x.old_logp, x.ref_logp, x.advantages))
    grpo_loss(logp, *others).backward()
    return logp, hidden.grad, weight.grad


def relative_error(values: Tensor, wanted: Tensor) -> float:
    return float((values.double() - wanted).norm() / wanted.norm())


def print_errors(n: int = 512, hidden: int = 256, vocabulary: int = 8192) -> None:
    """Print the table of errors."""
    print(
        f"\nLargest error of log-probabilities, and of both gradients relative to their norms; "
        f"N {n}, H {hidden}, V {vocabulary}\n"
    )
    print_head("| | float32 | gradients | bfloat16 | gradients |")
    ways = installed_ways()
    cells = {name: [] for name in ways}
    for dtype in ("float32", "bfloat16"):
        x = make_inputs(n, hidden, vocabulary, dtype)
        wanted, hidden_grad, weight_grad = exact(x)
        for name, way in ways.items():
            logp = run(way, x)
            off = "" if logp is None else f"{(logp.double() - wanted).abs().max():.1e}"
            grads = max(
                relative_error(x.hidden.grad, hidden_grad),
                relative_error(x.weight.grad, weight_grad),
            )
            cells[name] += [off, f"{grads:.1e}"]
    for name, row in cells.items():
        print(f"| {name} | {' | '.join(row)} |")


def compare(case: str, ways: dict[str, Callable], cycles: int) -> None:
    """Print the table of times and memory."""
    n, hidden, vocabulary, dtype = parse_case(case)
    x = make_inputs(n, hidden, vocabulary, dtype)
    seconds = medians([partial(run, way, x) for way in ways.values()], cycles)
    memory = [own_process(__file__, case, "--peak", name)[0] for name in ways]
    print(f"\nN {n}, H {hidden}, V {vocabulary}, {dtype}\n")
    print_head("| | s | plain / this | MiB | of plain |")
    for name, s, mib in zip(ways, seconds, memory):
        print(
            f"| {name} | {s:.2f} | {seconds[0] / s:.2f} | {mib:.0f} | {mib / memory[0]:.3f} |",
            flush=True,
        )


def parse_case(case: str) -> tuple[int, int, int, str]:
    n, hidden, vocabulary, dtype = case.split()
    return int(n), int(hidden), int(vocabulary), dtype


def main() -> None:
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

    ways = installed_ways()
    if args.peak:
        print_peak(*parse_case(args.cases[0]), ways[args.peak])
        return
    print(f"{machine()}; median of {args.cycles}")
    if args.ways:
        begins = ("plain", *args.ways.split(","))
        ways = {name: way for name, way in ways.items() if name.startswith(begins)}
    for case in args.cases:
        compare(case, ways, args.cycles)
    if not args.ways:
        print_errors()


if __name__ == "__main__":
    main()
