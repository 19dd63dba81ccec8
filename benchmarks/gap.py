"""Where sampled and scored log-probabilities come apart in bfloat16, part by part.

  python benchmarks/gap.py        3 minutes on one CPU core
  python benchmarks/gap.py --tiny

Sampling and scoring run the same weights in different ways (fast/shared_decode.py and
fast/shared_prefix.py), so they round differently. Here all is in float32, except for one part:

  both      as model.precision=bfloat16 has it, in sampling and in scoring
  scoring   what transformers rounds, and the decoder does not
  sampling  what the decoder keeps in float32, if it did not

The model: a random Qwen3-VL of width 2,048 with 4 layers, 16 heads over 8, a vocabulary of 32,768.
"""

import argparse
from contextlib import ExitStack
from unittest.mock import patch

import torch
from common import machine, print_head, questions
from gpu import QWEN3_VL_2B, TINY, random_policy, step_config
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextRMSNorm

import fast.shared_decode as decode
import model
from fast.shared_decode import SharedDecoder
from model import Policy

G = 8
SMALLER = QWEN3_VL_2B._replace(
    text=QWEN3_VL_2B.text | dict(vocab_size=32_768, num_hidden_layers=4),
    vision=QWEN3_VL_2B.vision | dict(depth=4, deepstack_visual_indexes=[0, 1, 2]),
    side=224,
    prompts=2,
    new_tokens=32,
)

linear = nn.Linear.forward
product = model.product
norm = decode.rms_norm
rotate = decode.rotate
query_norm = Qwen3VLTextRMSNorm.forward
attend = SharedDecoder.attend
sdpa = F.scaled_dot_product_attention


def half(x: Tensor) -> Tensor:
    return x.bfloat16()


def rounded(function):
    """The function with its results rounded to bfloat16, and held in float32."""
    return lambda *args, **options: half(function(*args, **options)).float()


# ------------------------------------------------------------------------------- the parts


def half_linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """A linear layer, as autocast runs it."""
    bias = None if layer.bias is None else half(layer.bias)
    return F.linear(half(x), half(layer.weight), bias).float()


def half_product(a, b):
    """Operands of the head in half precision, sums in float32."""
    return product(half(a).float(), half(b).float())


def half_sdpa(q, k, v, **options):
    return sdpa(half(q), half(k), half(v), **options).float()


def half_attend(decoder, q, past, own, own_mask):
    past = [half(t) for t in past]
    with patch.object(decoder, "dtype", torch.bfloat16):
        return attend(decoder, half(q), past, half(own), own_mask).float()


def half_residual(layer, x):
    """Of the residual stream (n, H), what each layer reads."""
    return norm(layer, half(x).float() if x.ndim == 2 else x)


def half_query_norm(layer, x):
    """The norms of queries and keys (1, N, h, d) round their result to the type of their input."""
    if x.ndim < 4:
        return query_norm(layer, x)
    normed = F.rms_norm(x, layer.weight.shape, eps=layer.variance_epsilon)
    return layer.weight * half(normed).float()


# What stands in for what while a part is in half precision.
PARTS = {
    "both: products of the layers": [(nn.Linear, "forward", half_linear)],
    "both: attention": [
        (F, "scaled_dot_product_attention", half_sdpa),
        (SharedDecoder, "attend", half_attend),
    ],
    "both: head": [(model, "product", half_product)],
    "scoring: norms of queries and keys": [(Qwen3VLTextRMSNorm, "forward", half_query_norm)],
    "sampling: all norms": [(decode, "rms_norm", rounded(norm))],
    "sampling: rotation": [(decode, "rotate", rounded(rotate))],
    "sampling: residual stream": [(decode, "rms_norm", half_residual)],
}


@torch.no_grad()
def gap(policy: Policy, examples: list, new_tokens: int, parts: list) -> Tensor:
    """|sampled - scored| log-probabilities of all tokens, with these parts in half precision."""
    policy.decoder = None
    with ExitStack() as stack:
        for where, name, other in parts:
            stack.enter_context(patch.object(where, name, other))
        rollouts = policy.sample(examples, G, new_tokens, 1.0)
        prompts = [r.prompt for r in rollouts]
        logp, _, mask = policy.logprobs(prompts, [r.tokens for r in rollouts])
    sampled = model.pad_rows([row for r in rollouts for row in r.logprobs["sampled"]])
    return (logp - sampled)[mask].abs()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tiny", action="store_true")
    sizes = TINY if parser.parse_args().tiny else SMALLER
    policy = random_policy(sizes, step_config(sizes, "model.precision=float32"))
    examples = questions(policy.config, sizes.prompts, sizes.words)
    print(f"{machine()}; {sizes.prompts * G * sizes.new_tokens} tokens\n")
    print_head("| in bfloat16 | mean gap | largest |")

    def print_row(name, parts):
        found = gap(policy, examples, sizes.new_tokens, parts)
        print(f"| {name} | {found.mean():.1e} | {found.max():.1e} |", flush=True)

    print_row("nothing", [])
    for name, parts in PARTS.items():
        print_row(name, parts)
    policy.config.model.precision = "bfloat16"
    print_row("everything, as it runs", [])


if __name__ == "__main__":
    main()
