"""Everything that touches tensors or processes.

In order of appearance
  fused_logprobs         log p(token) without ever holding [tokens, vocabulary] logits
  PackedAttention, SharedDecoder     every prompt once for all of its completions, in scoring and in sampling
  LoRALinear             a layer with low-rank adapters
  Rollout                G completions of one prompt: what passes between sampling and update
  Policy                 a vision-language model that can encode, sample, logprobs, save
    .sample              the sampler: one prefill per prompt, all completions decoded together
    .logprobs    the same tokens scored with gradients, prompts and completions in one stream
  load_policy, image_only, build_tiny     a model folder or hub id, or the built-in tiny Qwen3-VL made from scratch
  make_optimizers, optimizer_step     AdamW, or Muon beside it
  save_checkpoint, resume, open_run, Log     whole-or-nothing checkpoints and what a run folder holds
  memory_plan, plan      what a run needs: python model.py plan config.yaml
  start, setup, rank, gather_objects, StopRequest     processes and signals
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import inspect
import itertools
import json
import math
import os
import re
import shutil
import signal
import sys
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from functools import cached_property
from operator import attrgetter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from torch.utils._pytree import tree_map
from tqdm import tqdm

import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    Qwen2VLImageProcessorPil,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
)
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.auto.image_processing_auto import (
    AutoImageProcessor,
)  # elsewhere older versions hide it
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
from transformers.utils import is_torchvision_available

import data
from data import Example, InputError

# ---------------------------------------------------------------------------------------------- fused log-probs

BUFFER = 1 << 22  # logits in a tile (16 MiB in float32)
NEVER = -1e30  # the logit of a banned id: its probability is 0, and so is 0 * NEVER


def head_logits(hidden, weight, bias, temperature, banned, out=None):
    """(n, v) logits / temperature: hidden (n, H), weight (v, H), bias (v,) or None, all float32; banned (k,) ids."""
    logits = hidden.new_empty(len(hidden), len(weight)) if out is None else out
    width = 4096 if hidden.is_cpu else len(weight)  # of a wide product, MKL makes a copy first
    for z, w in zip(logits.split(width, 1), weight.split(width)):
        torch.mm(hidden, w.T, out=z)
    if bias is not None:
        logits += bias
    if temperature != 1:
        logits /= temperature
    if banned is not None:
        logits[:, banned] = NEVER
    return logits


class FusedLogProbs(torch.autograd.Function):
    """Tile after tile of the vocabulary -> running log-sum-exp, the targets' logits, entropy. The backward makes each tile
    again: a matrix product more, but no loss needs to be known, and every weight's gradient is written once."""

    @staticmethod
    def tiles(hidden, weight, bias, temperature, banned):
        """(first id, last id + 1, the tile's weights (v, H), its logits (N, v)) in turn, in float32 and in one buffer."""
        size = min(len(weight), max(256, BUFFER // max(hidden.shape)))
        buffer = torch.empty(len(hidden) * size, device=hidden.device)
        for i in range(0, len(weight), size):
            w, b = (
                weight[i : i + size].float(),
                None if bias is None else bias[i : i + size].float(),
            )
            out = buffer[: len(hidden) * len(w)].view(len(hidden), len(w))
            bans = None if banned is None else banned[(banned >= i) & (banned < i + len(w))] - i
            yield i, i + len(w), w, head_logits(hidden, w, b, temperature, bans, out)

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, temperature, banned):
        peak = torch.full(
            targets.shape, NEVER, device=hidden.device
        )  # (N,): the largest logit so far
        total, weighted, chosen = (
            torch.zeros_like(peak) for _ in range(3)
        )  # sum of e^(z - peak), of that * (z - peak)
        for i, j, _, z in FusedLogProbs.tiles(hidden.float(), weight, bias, temperature, banned):
            here = (targets >= i) & (targets < j)
            chosen = torch.where(
                here, z.gather(1, (targets - i).clamp(0, j - i - 1)[:, None])[:, 0], chosen
            )
            old, peak = peak, torch.maximum(peak, z.amax(1))
            shrink, e = (old - peak).exp(), z.sub_(peak[:, None]).exp()
            weighted = shrink * (weighted + (old - peak) * total) + z.mul_(e).sum(1)
            total = shrink * total + e.sum(1)
        lse = peak + total.log()
        ctx.save_for_backward(hidden, weight, bias, targets, lse)
        ctx.options = temperature, banned
        entropy = total.log() - weighted / total
        ctx.mark_non_differentiable(entropy)
        return chosen - lse, entropy

    @staticmethod
    def backward(ctx, grad, _):
        hidden, weight, bias, targets, lse = ctx.saved_tensors
        temperature, banned = ctx.options
        h, slope = hidden.float(), grad[:, None] / temperature
        scaled = h * slope
        grad_hidden, grad_weight, grad_bias = (
            torch.zeros_like(t, dtype=kind) if needed else None
            for t, kind, needed in zip(
                (h, weight, bias), (h.dtype, weight.dtype, None), ctx.needs_input_grad
            )
        )
        for i, j, w, z in FusedLogProbs.tiles(h, weight, bias, temperature, banned):
            # d log p(t) / d logits = onehot(t) - p, and logits = (h w + b) / temperature; a token's slope goes into the products
            p, here = z.sub_(lse[:, None]).exp_(), ((targets >= i) & (targets < j)).nonzero()[:, 0]
            if grad_hidden is not None:
                grad_hidden.addmm_(p, w)
            if grad_weight is not None:
                grad_weight[i:j] = (p.T @ -scaled).index_add_(0, targets[here] - i, scaled[here])
            if grad_bias is not None:
                grad_bias[i:j] = (p.T @ -slope).index_add_(0, targets[here] - i, slope[here])[:, 0]
        if grad_hidden is not None:
            grad_hidden = (weight[targets].float() - grad_hidden).mul_(slope).to(hidden.dtype)
        return grad_hidden, grad_weight, grad_bias, None, None, None


def fused_logprobs(hidden, weight, targets, temperature=1.0, banned=None, bias=None):
    """Log-probabilities of `targets` and entropies under softmax((hidden @ weight.T + bias) / temperature), in float32.

    hidden (N, H), weight (V, H), bias (V,) of any float dtype, targets (N,) ids, N >= 1; `banned` (K,) ids have probability 0
    and are no targets. Returns (logprobs (N,), entropy (N,)); only logprobs carries gradients. Memory: one tile, and what N
    times H or 256 numbers take.
    """
    with torch.autocast(hidden.device.type, enabled=False):
        return FusedLogProbs.apply(hidden, weight, bias, targets, temperature, banned)


def draw(logits, uniform):
    """One id for each row of logits (R, V), which are overwritten, by inverting the cumulative distribution at uniform (R,) in
    [0, 1), float64; None takes the likeliest. Returns the ids and their log-probabilities, (R,) each.

    In two steps, a block of 128 ids and then one of these: a large vocabulary is passed over a few times only.
    """
    rows = torch.arange(len(logits), device=logits.device)
    peak, likeliest = logits.max(1) if uniform is None else (logits.amax(1), None)
    p = logits.sub_(peak[:, None]).exp_()  # times a constant
    if p.shape[1] % 128:
        p = F.pad(p, (0, -p.shape[1] % 128))
    blocks = p.unflatten(1, (-1, 128))  # (R, V / 128, 128)
    mass = blocks.sum(2).double()
    cdf = mass.cumsum(1)
    if uniform is None:
        token = likeliest
    else:
        goal = uniform[:, None] * cdf[:, -1:]
        block = torch.searchsorted(cdf, goal, right=True).clamp(max=cdf.shape[1] - 1)  # (R, 1)
        share = (goal - cdf.gather(1, block)) / mass.gather(1, block) + 1  # how far into the block
        within = blocks[rows, block[:, 0]].double().cumsum(1)  # (R, 128)
        goal = (
            share.clamp(0, 1 - 1e-9) * within[:, -1:]
        )  # below its end, where only ids of probability 0 may be
        token = (128 * block + torch.searchsorted(within, goal, right=True))[:, 0].clamp(
            max=logits.shape[1] - 1
        )  # of NaN: anything
    return token, p[rows, token].log() - cdf[:, -1].log().float()


# ---------------------------------------------------------------------------------------------- attention to shared prompts

SHARING = {
    "qwen3_vl",
    "qwen2_5_vl",
    "qwen2_vl",
}  # model types whose attention takes the argument `shared`; SharedDecoder knows their layers
ANY_MASK = torch.ones(
    1, 1, 1, 1, dtype=torch.bool
)  # a 4-D mask is passed on untouched, and `shared` needs none
ROWS_TOGETHER = 12  # from so many completions on, the long and the short ones attend apart
ROOM = 64  # tokens by which the keys of the completions grow at a time


def shared_attention(
    module, query, key, value, attention_mask, scaling=None, shared=None, **options
):
    """An attention function of transformers: query (B, H, L, d), key and value (B, h, L, d) -> (B, L, H, d)."""
    if shared is None:
        return ALL_ATTENTION_FUNCTIONS["sdpa"](
            module, query, key, value, attention_mask, scaling=scaling, **options
        )
    return shared.attend(query, key, value, scaling), None


ALL_ATTENTION_FUNCTIONS.register("shared", shared_attention)
ALL_MASK_ATTENTION_FUNCTIONS.register("shared", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])


class PackedAttention:
    """Attention in one stream [prompt 1 | .. | prompt B | row 1 | .. | row R] without padding: a prompt attends causally to
    itself, a row to its prompt and causally to itself. Nothing is computed between prompts or between rows: prompts of one
    length make a block, rows of similar length are padded to the longest, each beside a copy of its prompt's keys."""

    def __init__(self, prompt_lengths, row_lengths, owner):
        """(B,) and (R,) token counts; owner (R,): the prompt of each row. Prompts are sorted by length, rows by the length of
        their prompts and then by their own, so that what attends together stands together."""
        self.prompts, self.parts, self.sizes, first, device = [], [], [], 0, owner.device
        for block, (length, count) in enumerate(
            zip(*(t.tolist() for t in prompt_lengths.unique_consecutive(return_counts=True)))
        ):
            self.prompts.append((count, length))
            self.sizes.append(count * length)
            rows = ((owner >= first) & (owner < first + count)).nonzero()[:, 0]
            for some in rows.tensor_split(
                min(4, len(rows) // ROWS_TOGETHER + 1)
            ):  # rows of similar length: little padding
                places = torch.arange(
                    int(row_lengths[some].max()) if len(some) else 0, device=device
                )  # (T,)
                real = places < row_lengths[some, None]  # (r, T)
                mask = F.pad(places <= places[:, None], (length, 0), value=True)  # (T, P + T)
                if len(places):
                    own = None if real.all() else real.flatten().nonzero()[:, 0]
                    self.parts.append((block, owner[some] - first, own, mask))
            first += count
        self.sizes += [
            len(owner) * len(mask) if own is None else len(own)
            for _, owner, own, mask in self.parts
        ]

    def attend(self, query, key, value, scaling):
        if (
            query.is_cuda and query.shape[1] != key.shape[1]
        ):  # its fast kernels take a mask or grouped heads, not both
            key, value = (
                t.repeat_interleave(query.shape[1] // t.shape[1], 1) for t in (key, value)
            )
        options = {"scale": scaling, "enable_gqa": query.shape[1] != key.shape[1]}
        pieces = list(
            zip(*(t[0].transpose(0, 1).split(self.sizes) for t in (query, key, value)))
        )  # (n, H | h, d) each
        prompts, outs = [], []
        for (b, length), piece in zip(self.prompts, pieces):
            q, *past = (
                t.unflatten(0, (b, length)).transpose(1, 2) for t in piece
            )  # (b, H | h, P, d)
            prompts.append(past)
            outs.append(
                F.scaled_dot_product_attention(q, *past, is_causal=True, **options)
                .transpose(1, 2)
                .flatten(0, 1)
            )
        for (block, owner, own, mask), piece in zip(self.parts, pieces[len(prompts) :]):
            if own is not None:  # padded to (r * T, H | h, d)
                piece = (
                    t.new_zeros(len(owner) * len(mask), *t.shape[1:]).index_copy(0, own, t)
                    for t in piece
                )
            q, k, v = (
                t.unflatten(0, (len(owner), -1)).transpose(1, 2) for t in piece
            )  # (r, H | h, T, d)
            k, v = (
                torch.cat(
                    [
                        t.expand(len(owner), -1, -1, -1)
                        if len(t) == 1
                        else t.index_select(0, owner),
                        new,
                    ],
                    2,
                )
                for t, new in zip(prompts[block], (k, v))
            )  # (r, h, P + T, d)
            out = (
                F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **options)
                .transpose(1, 2)
                .flatten(0, 1)
            )
            outs.append(out if own is None else out.index_select(0, own))
        return torch.cat(outs)[None]


def normed(layer, x):
    """RMS normalisation by a layer of a Qwen-VL model, in one call."""
    return F.rms_norm(x.float(), x.shape[-1:], layer.weight.float(), layer.variance_epsilon)


def half(tensor):
    """As autocast would cast it for a product: what many products read is better cast once (rotation has made it float32)."""
    kind = tensor.device.type
    return tensor.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else tensor


class SharedDecoder:
    """One new token for each of R completions through the text layers of a Qwen-VL model, which is all that its forward does
    once the images are in. Completions attend to their B prompts, whose keys and values are held once, and to themselves."""

    def __init__(self, base, cache, mask, start, group_size):
        """The prompts' cache, (B, h, P, d) per layer, mask (B, P), and the position that follows each, (B,)."""
        self.text, self.length, self.start = (
            base.language_model,
            0,
            start.repeat_interleave(group_size),
        )
        self.prompts = [tuple(map(half, (layer.keys, layer.values))) for layer in cache.layers]
        self.own = [
            tuple(t[:, :, :0].repeat_interleave(group_size, 0) for t in layer)
            for layer in self.prompts
        ]
        self.bias = torch.zeros(mask.shape, device=mask.device).masked_fill(mask == 0, -torch.inf)[
            :, None, None
        ]
        self.seat(torch.arange(len(mask), device=mask.device).repeat_interleave(group_size))

    def seat(self, owner):
        """owner (R,), ascending: the prompt of each row. Every prompt gets as many seats as the one with the most rows needs."""
        place = torch.arange(len(owner), device=owner.device) - torch.searchsorted(
            owner, owner
        )  # which of its prompt's rows
        self.owner, self.seats = owner, int(place.max()) + 1
        self.seated = (
            None if len(owner) == len(self.bias) * self.seats else owner * self.seats + place
        )

    def keep(self, live):
        """Retires all rows but `live` (R,), and prompts without any."""
        rows = live.nonzero()[:, 0]
        self.start, self.own = (
            self.start[rows],
            [tuple(t.index_select(0, rows) for t in layer) for layer in self.own],
        )
        prompts, owner = self.owner[rows].unique(return_inverse=True)
        if len(prompts) < len(self.bias):
            self.prompts = [
                tuple(t.index_select(0, prompts) for t in layer) for layer in self.prompts
            ]
            self.bias = self.bias[prompts]
        self.seat(owner)

    def side_by_side(self, rows):
        """(R, h, n, k) -> (B, h, seats * n, k): the rows of a prompt meet its keys in one product. Empty seats hold zeros."""
        if self.seated is not None:
            rows = rows.new_zeros(len(self.bias) * self.seats, *rows.shape[1:]).index_copy_(
                0, self.seated, rows
            )
        return rows.unflatten(0, (-1, self.seats)).transpose(1, 2).flatten(2, 3)

    def apart(self, slots):
        """The way back: (B, h, seats * n, k) -> (R, h, n, k)."""
        rows = slots.unflatten(2, (self.seats, -1)).transpose(1, 2).flatten(0, 1)
        return rows if self.seated is None else rows.index_select(0, self.seated)

    def step(self, tokens):
        """The last hidden states (R, H) after tokens (R,)."""
        rotary = self.text.rotary_emb  # text has one position on all axes of M-RoPE
        angles = (self.start + self.length)[:, None, None] * rotary.inv_freq  # (R, 1, d / 2)
        cos, sin = angles.cos() * rotary.attention_scaling, angles.sin() * rotary.attention_scaling
        rotation = torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)
        x = self.text.embed_tokens(tokens)
        for i, layer in enumerate(self.text.layers):
            x = x + self.attend(i, layer.self_attn, normed(layer.input_layernorm, x), *rotation)
            x = x + layer.mlp(normed(layer.post_attention_layernorm, x))
        self.length += 1
        return normed(self.text.norm, x)

    def attend(self, i, layer, x, cos, sin):
        """x (R, H) -> (R, H); the new keys and values join those of layer i."""
        q, k, v = (
            project(x).view(len(x), -1, layer.head_dim)
            for project in (layer.q_proj, layer.k_proj, layer.v_proj)
        )
        if hasattr(layer, "q_norm"):  # Qwen3
            q, k = normed(layer.q_norm, q), normed(layer.k_norm, k)
        q, k = (
            torch.addcmul(t * cos, t.roll(layer.head_dim // 2, -1), sin) for t in (q, k)
        )  # rotated, (R, H | h, d)
        if self.own[i][0].shape[2] == self.length:
            self.own[i] = tuple(F.pad(t, (0, 0, 0, ROOM)) for t in self.own[i])
        for buffer, new in zip(self.own[i], (k, v)):
            buffer[:, :, self.length] = new
        own_k, own_v = (buffer[:, :, : self.length + 1] for buffer in self.own[i])
        past_k, past_v = self.prompts[i]
        q = (q * layer.scaling).view(
            len(x), k.shape[1], -1, layer.head_dim
        )  # (R, h, H / h, d): heads that share keys together
        scores = self.apart(self.side_by_side(q) @ past_k.mT + self.bias)
        weights = (
            torch.cat([scores, q @ own_k.mT], -1).softmax(-1, torch.float32).to(q.dtype)
        )  # (R, h, H / h, P + t)
        past, own = weights.split([past_k.shape[2], own_k.shape[2]], -1)
        return layer.o_proj((self.apart(self.side_by_side(past) @ past_v) + own @ own_v).flatten(1))


class PlainDecoder:
    """The plain twin, for any model: its own forward and cache, with a copy of the prompt for every completion."""

    def __init__(self, base, cache, mask, start, group_size):
        cache.batch_repeat_interleave(group_size)
        self.base, self.cache, self.length = base, cache, 0
        self.mask, self.start = (t.repeat_interleave(group_size, 0) for t in (mask, start))

    def keep(self, live):
        self.cache.batch_select_indices(live.nonzero().squeeze(-1))
        self.mask, self.start = self.mask[live], self.start[live]

    def step(self, tokens):
        self.mask = F.pad(self.mask, (0, 1), value=1)
        positions = (self.start + self.length)[:, None]
        self.length += 1
        return self.base(
            input_ids=tokens[:, None],
            attention_mask=self.mask,
            past_key_values=self.cache,
            use_cache=True,
            position_ids=positions.expand(3, -1, -1)
            if hasattr(self.base, "get_rope_index")
            else positions,
        ).last_hidden_state[:, 0]


# ---------------------------------------------------------------------------------------------- low-rank adapters


class LoRALinear(torch.nn.Linear):
    """y = W x + (alpha / r) B A x with a frozen W (Hu et al. 2021, equation 3); alpha = 2 r."""

    scale, on = 2.0, True

    def forward(self, x):
        y = super().forward(x)
        return y + self.scale * F.linear(F.linear(x, self.lora_A), self.lora_B) if self.on else y


# ---------------------------------------------------------------------------------------------- the policy

FEATURES = "image features"  # where a prompt keeps the output of a frozen vision tower


@dataclass
class Rollout:
    """G sampled completions of one prompt, with the prompt's image held once."""

    example: Example
    prompt: dict  # the processor's tensors for this prompt
    tokens: list  # G tensors (T_g,) of sampled ids, the end-of-turn token included
    logprobs: list  # G tensors (T_g,): log-probabilities under which they were sampled
    texts: list  # G decoded strings
    finished: list  # G bools: ended by itself rather than at max_new_tokens
    parts: dict = field(default_factory=dict)  # reward part -> (G,), filled in by scoring
    old_logprobs: list | None = (
        None  # like logprobs, under the policy before the first of several updates
    )
    ref_logprobs: list | None = None  # like logprobs, under the frozen reference
    rewards: torch.Tensor | None = None  # (G,)
    advantages: torch.Tensor | None = None  # (G,)


def unflatten(flat, mask):
    """Each (N,) in flat -> (R, T), where mask (R, T) has N true entries; 0 elsewhere."""
    return [values.new_zeros(mask.shape).masked_scatter(mask, values) for values in flat]


def collate(prompts):
    """Single-prompt inputs -> one batch: token-shaped tensors are left-padded with 0; the others, whose first dimension counts
    images or their parts, are concatenated, with zeros at the end of further dimensions (crops of an image, its height)."""
    length = max(p["input_ids"].shape[1] for p in prompts)

    def joined(name):
        tensors = [p[name] for p in prompts]
        if tensors[0].shape == prompts[0]["input_ids"].shape:
            return torch.cat([F.pad(t, (length - t.shape[1], 0)) for t in tensors])
        out = tensors[0].new_zeros(
            sum(map(len, tensors)), *map(max, zip(*(t.shape[1:] for t in tensors)))
        )
        for part, t in zip(out.split([len(t) for t in tensors]), tensors):
            part[(slice(None), *map(slice, t.shape[1:]))] = t
        return out

    return {name: joined(name) for name in prompts[0] if name != FEATURES}


def inside(method):
    """A method of Policy that runs within the forward of its model, which is what gathers the root's weights if they are sharded."""

    @functools.wraps(method)
    def wrapped(self, *args, **kwargs):
        return (
            self.model.run(lambda: method(self, *args, **kwargs))
            if self.sharded
            else method(self, *args, **kwargs)
        )

    return wrapped


class Policy:
    """A Hugging Face vision-language model with its processor."""

    sharded, spare, start = (
        False,
        None,
        "",
    )  # spare: a prompt for `idle`; start: the checkpoint that training began at

    def __init__(self, model, processor, config, path=""):
        self.config, self.path = config, path
        self.device = torch.device(
            f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
        )
        self.model, self.processor, self.tokenizer = (
            model.float().eval(),
            processor,
            processor.tokenizer,
        )
        if not self.head[0].is_meta:
            self.model.to(self.device)
        self.base = model.model  # without the language-model head
        sliding = "sliding_attention" in (
            getattr(model.config.get_text_config(), "layer_types", None) or ()
        )
        rotation = (getattr(model.config.get_text_config(), "rope_parameters", None) or {}).get(
            "rope_type"
        )
        by_length = rotation in (
            "dynamic",
            "longrope",
        )  # positions turn by angles that depend on the longest row
        self.shared = (
            config.model.shared_prefix
            and model.config.model_type in SHARING
            and not sliding
            and not by_length
        )
        if self.shared:
            model.set_attn_implementation({"text_config": "shared", "vision_config": "sdpa"})
        elif config.model.shared_prefix:
            say(
                f"model.shared_prefix: {model.config.model_type} is none of {', '.join(sorted(SHARING))}, or its attention has windows, or "
                f"its rotation changes with the length: "
                f"each completion runs its prompt"
            )
        model.requires_grad_(True)
        self.vision_frozen, self.adapted = False, {}  # {name: layer with adapters}
        if config.model.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            for module in model.modules():  # it is active in train mode only, where there
                for name in (
                    "p",
                    "dropout",
                    "attention_dropout",
                ):  # must be no dropout: old and new log-probs
                    if isinstance(vars(module).get(name), float):  # have to agree
                        setattr(module, name, 0.0)
        stop = model.generation_config.eos_token_id
        stop = [] if stop is None else [stop] if isinstance(stop, int) else list(stop)
        added = self.tokenizer.added_tokens_decoder
        turns = [
            {"role": role, "content": [{"type": "text", "text": "ANSWER"}]}
            for role in ("user", "assistant")
        ]
        after = processor.apply_chat_template(turns, tokenize=False).rpartition("ANSWER")[2]
        after = self.tokenizer(after, add_special_tokens=False)["input_ids"]
        self.end_id = next(
            (i for i in after if i in added), self.tokenizer.eos_token_id
        )  # Gemma's turns end with another
        self.stop_ids = torch.tensor(
            sorted({*stop, self.end_id, self.tokenizer.eos_token_id}), device=self.device
        )
        # A sampled image token could not be scored again (no image belongs to it): banned in sampling and scoring alike.
        vision = {
            i
            for i, token in added.items()
            if re.search(r"image|img|vision|video|^<row_\d", token.content, re.IGNORECASE)
        }
        vision = sorted(i for i in {*vision, model.config.image_token_id} if i < len(self.head[0]))
        self.banned = torch.tensor(vision, dtype=torch.long, device=self.device)

    @property
    def head(self):
        """Weight (V, H) and bias (V,) or None of the language-model head, which may be the embedding's own weight."""
        head = self.model.get_output_embeddings()
        return head.weight, head.bias

    def parameters(self):
        return [p for p in self.model.parameters() if p.requires_grad]

    def autocast(self):
        half = self.config.model.precision == "bfloat16"
        return torch.autocast(self.device.type, torch.bfloat16) if half else nullcontext()

    @contextmanager
    def cast_once(self):
        """While sampling, autocast keeps a half-precision copy of every weight. By itself it does so for those that require
        gradients, and would cast frozen ones again for every token."""
        frozen = [] if self.sharded else [p for p in self.model.parameters() if not p.requires_grad]
        try:
            for p in frozen:
                p.requires_grad_(True)
            yield
        finally:
            for p in frozen:
                p.requires_grad_(False)

    # -- inputs: the one function that every stage builds its inputs with

    def chat(self, example):
        """The user turn up to where the assistant begins, with one placeholder per image."""
        turns = [text for turn in example.history for text in turn] + [data.prompt_text(example)]
        messages = [
            {"role": role, "content": [{"type": "text", "text": text}]}
            for text, role in zip(turns, itertools.cycle(["user", "assistant"]))
        ]
        messages[0]["content"][:0] = [{"type": "image"}] * len(example.images)
        return self.processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=False
        )

    def encode(self, example):
        """The model inputs for one prompt: a dict of tensors (1, P) plus pixel values. Raises InputError."""
        images = data.open_images(example)
        try:
            text, begin = self.chat(example), self.tokenizer.bos_token
            inputs = dict(
                self.processor(
                    text=[text],
                    images=[images],
                    return_tensors="pt",  # not a second begin token
                    add_special_tokens=not (begin and text.startswith(begin)),
                )
            )
        except ValueError as error:
            sizes = ", ".join(f"{i.width}x{i.height}" for i in images)
            raise InputError(
                f"{example.id}: the processor refuses its images ({sizes}): {error}"
            ) from None
        length, limit = inputs["input_ids"].shape[1], self.config.model.max_prompt_tokens
        if length > limit:
            raise InputError(
                f"{example.id}: the prompt with its images takes {length} tokens, more than "
                f"model.max_prompt_tokens={limit}; raise it or lower model.max_pixels"
            )
        return {k: v.to(self.device) for k, v in inputs.items()}

    def split_at_images(self, prompt):
        """(prompt up to its last image token, the ids (Q,) after it): the part that all questions on an image share."""
        end = int((prompt["input_ids"][0] == self.model.config.image_token_id).nonzero()[-1]) + 1
        shape = prompt["input_ids"].shape
        return {k: v[:, :end] if v.shape == shape else v for k, v in prompt.items()}, prompt[
            "input_ids"
        ][0, end:]

    def question_ids(self, example):
        """(Q,) ids of the prompt after its last image token, without opening the images."""
        chat, token = self.chat(example), self.processor.image_token
        if chat.count(token) > len(example.images):
            raise InputError(
                f"{example.id}: its question contains {token}, which only stands for an image; take it out"
            )
        text = self.image_end + chat.rpartition(token)[2]
        return torch.tensor(
            self.tokenizer(text, add_special_tokens=False)["input_ids"], device=self.device
        )

    @cached_property
    def image_end(self):
        """What the processor writes after the tokens of an image, e.g. Gemma's <end_of_image> and two newlines."""
        ids = self.processor(
            text=[self.processor.image_token],
            images=[[Image.new("RGB", (64, 64))]],
            return_tensors="pt",
            add_special_tokens=False,
        )["input_ids"][0]
        return self.tokenizer.decode(
            ids[int((ids == self.model.config.image_token_id).nonzero()[-1]) + 1 :]
        )

    def encode_all(self, examples, encode=None):
        """(example, inputs, or what `encode` gives) for each usable example. data.on_error=skip leaves the others out and says so."""
        pairs = []
        for example in examples:
            try:
                pairs.append((example, (encode or self.encode)(example)))
            except InputError as error:
                if self.config.data.on_error == "stop":
                    raise
                tqdm.write(f"skipped: {error}", file=sys.stderr)
        return pairs

    def encode_target(self, example):
        """(T,) ids of the supervised answer with its end-of-turn token."""
        ids = self.tokenizer(data.target_text(example), add_special_tokens=False)["input_ids"]
        ids = torch.tensor(ids + [self.end_id], device=self.device)
        if torch.isin(ids, self.banned).any():
            raise InputError(
                f"{example.id}: its answer contains {self.tokenizer.decode(ids[torch.isin(ids, self.banned)][:1])}, which "
                f"only stands for an image; take it out"
            )
        return ids

    def positions(self, batch):
        """Prompt positions, (3, B, P) for M-RoPE models and (B, P) otherwise, and each prompt's next position (B,).

        Passed explicitly everywhere: left to itself, an M-RoPE model reuses offsets cached by an earlier call.
        """
        mask = batch["attention_mask"]
        if hasattr(self.base, "get_rope_index"):
            kinds = {
                k: batch[k]
                for k in ("input_ids", "mm_token_type_ids", "image_grid_thw", "attention_mask")
                if k in batch
            }
            positions, _ = self.base.get_rope_index(**kinds)
            return positions, positions.amax((0, 2)) + 1
        return (mask.cumsum(-1) - 1).clamp(min=0), mask.sum(-1)

    def later_positions(self, start, offsets):
        """Positions (R, T) of completion tokens, for M-RoPE the same on all three axes. start (R,), offsets (T,)."""
        positions = start[:, None] + offsets[None]
        return positions.expand(3, -1, -1) if hasattr(self.base, "get_rope_index") else positions

    def prefill(self, prompts):
        """Runs B prompts once: last hidden states (B, H), their key-value cache, mask (B, P), next positions (B,)."""
        batch = collate(prompts)
        positions, start = self.positions(batch)
        if features := self.frozen_features(prompts):
            batch |= features
            del batch["pixel_values"]
        out = self.base(**batch, position_ids=positions, use_cache=True)
        return out.last_hidden_state[:, -1], out.past_key_values, batch["attention_mask"], start

    def frozen_features(self, prompts):
        """The images of B prompts as a frozen vision tower sees them, as an argument of the model; {} where it is trained.

        The tower runs once per prompt: sampling, reference (which starts from the same tower) and update share the result.
        """
        new = [p for p in prompts if FEATURES not in p]
        if new and not (
            self.vision_frozen
            and "image_grid_thw" in new[0]  # Qwen-VL: others lay features out otherwise
            and "mm_encoder_outputs" in inspect.signature(self.base.forward).parameters
        ):
            return {}
        if new:
            batch = collate(new)
            out = self.base.get_image_features(
                batch["pixel_values"], batch["image_grid_thw"], return_dict=True
            )
            levels = [
                iter(level)
                for level in (out.pooler_output, *(getattr(out, "deepstack_features", None) or ()))
            ]
            for p in new:  # level -> one tensor per image
                p[FEATURES] = [
                    list(itertools.islice(level, len(p["image_grid_thw"]))) for level in levels
                ]
        embeddings, *deepstack = (sum(level, []) for level in zip(*(p[FEATURES] for p in prompts)))
        return {
            "mm_encoder_outputs": {
                "image": SimpleNamespace(pooler_output=embeddings, deepstack_features=deepstack)
            }
        }

    # -- sampling

    @torch.no_grad()
    def sample(self, examples, group_size, max_new_tokens, temperature, stream=(0,)):
        """G completions of every example's prompt from the full softmax (never top-k or top-p); temperature 0 is greedy.

        Each (stream, example, sample) has its own random numbers, so the samples do not depend on batch order or on the
        number of processes. Returns one Rollout per usable example.
        """
        self.model.eval()
        if not (pairs := self.encode_all(examples)):
            return []
        uniform = torch.from_numpy(
            np.stack(
                [
                    np.random.default_rng(
                        [*stream, int(hashlib.sha1(e.id.encode()).hexdigest()[:12], 16), g]
                    ).random(max_new_tokens)
                    for e, _ in pairs
                    for g in range(group_size)
                ]
            )
        ).to(self.device)  # (R, max_new_tokens)
        with self.autocast(), self.cast_once():
            tokens, logprobs, lengths, finished = self.decode_groups(
                [p for _, p in pairs], group_size, uniform, temperature
            )
        rollouts = []
        for i, (example, prompt) in enumerate(pairs):
            group = range(i * group_size, (i + 1) * group_size)
            ids = [tokens[r, : lengths[r]] for r in group]
            rollouts.append(
                Rollout(
                    example,
                    prompt,
                    ids,
                    [logprobs[r, : lengths[r]] for r in group],
                    [self.decode(row) for row in ids],
                    finished[group.start : group.stop].tolist(),
                )
            )
        return rollouts

    @inside
    def decode_groups(self, prompts, group_size, uniform, temperature):
        """The decode loop: one prefill per prompt, then all R = B*G rows together; rows that have ended are retired.

        uniform (R, T) are the random numbers. Returns tokens and their log-probabilities (R, T), lengths and whether
        each row ended by itself (R,).
        """
        hidden, *prefilled = self.prefill(prompts)
        decoder = (SharedDecoder if self.shared else PlainDecoder)(
            self.base, *prefilled, group_size
        )
        hidden = hidden.repeat_interleave(group_size, 0)  # (R, H)
        rows = torch.arange(
            len(uniform), device=self.device
        )  # which completion each live row belongs to
        tokens = torch.zeros(uniform.shape, dtype=torch.long, device=self.device)
        logprobs = torch.zeros(uniform.shape, device=self.device)
        lengths = torch.full_like(rows, uniform.shape[1])
        finished = torch.zeros_like(rows, dtype=torch.bool)
        for t in range(uniform.shape[1]):
            with torch.autocast(self.device.type, enabled=False):
                logits = head_logits(
                    hidden.float(), *self.head, temperature or 1, self.banned
                )  # (live, V)
            token, logp = draw(logits, uniform[rows, t] if temperature else None)
            tokens[rows, t], logprobs[rows, t] = token, logp
            ended = torch.isin(token, self.stop_ids) & ~finished[rows]
            lengths[rows[ended]], finished[rows[ended]] = t + 1, True
            live = ~finished[rows]
            if t + 1 == uniform.shape[1] or not live.any():
                break
            if live.sum() <= 0.8 * len(rows):
                decoder.keep(live)
                rows, token = rows[live], token[live]
            hidden = decoder.step(token)
        if not logprobs.isfinite().all():
            raise InputError(
                "the model's logits are not finite: its weights have overflowed. Go back to an earlier checkpoint and lower lr, or try "
                "model.precision=float32"
            )
        return tokens, logprobs, lengths, finished

    def decode(self, ids):
        """Text of sampled ids without the end-of-turn token; other special tokens stay visible to the rewards."""
        return self.tokenizer.decode(
            ids[~torch.isin(ids, self.stop_ids)], skip_special_tokens=False
        )

    # -- scoring

    @inside
    def logprobs(self, prompts, completions, temperature=1.0, n_scored=None):
        """Scores several completions of each of B prompts; gradients flow.

        prompts: B dicts from `encode`; completions: B lists of id tensors (T,), R in all. Returns log-probabilities,
        entropies and a mask of scored tokens, each (R, T_max): all real tokens, or the last n_scored (R lengths) of each.
        """
        hidden, ids, scored = self.scored_hidden(prompts, completions, n_scored)
        weight, bias = self.head
        flat = fused_logprobs(hidden, weight, ids, temperature, self.banned, bias)
        return *unflatten(flat, scored), scored

    def scored_hidden(self, prompts, completions, n_scored=None):
        """Hidden states (N, H) that predict the scored tokens, these tokens (N,), and where they are (R, T_max)."""
        self.model.train(self.config.model.gradient_checkpointing)
        rows = [ids for group in completions for ids in group]
        owner = torch.tensor(
            [b for b, group in enumerate(completions) for _ in group], device=self.device
        )  # (R,)
        ids = pad_sequence(rows, batch_first=True)  # (R, T)
        lengths = torch.tensor([len(row) for row in rows], device=self.device)[:, None]
        places = torch.arange(ids.shape[1], device=self.device)
        mask = places < lengths  # (R, T)
        scored = (
            mask
            if n_scored is None
            else mask & (places >= lengths - torch.tensor(n_scored, device=self.device)[:, None])
        )
        with self.autocast():
            hidden = (self.packed_hidden if self.shared else self.plain_hidden)(
                prompts, ids, mask, owner, scored
            )
        return hidden, ids[scored], scored

    def packed_hidden(self, prompts, ids, mask, owner, scored):
        """Hidden states that predict the scored tokens, (n, H), from one stream of all prompts and rows without padding.

        Every prompt (and image) runs once for all of its rows. A row's last token predicts nothing and is left out.
        """
        sizes = torch.tensor([p["input_ids"].shape[1] for p in prompts], device=ids.device)  # (B,)
        order, lengths = (
            sizes.argsort(stable=True),
            mask.sum(1) - 1,
        )  # as PackedAttention wants them
        prompts, owner, sizes = [prompts[b] for b in order], order.argsort()[owner], sizes[order]
        rows = (sizes[owner] * ids.shape[1] + lengths).argsort(stable=True)
        ids, owner, lengths = ids[rows], owner[rows], lengths[rows]
        batch = collate(prompts)
        positions, start = self.positions(batch)
        real, places = (
            batch["attention_mask"].bool(),
            torch.arange(ids.shape[1], device=ids.device),
        )  # (B, P), (T,)
        inputs = places < lengths[:, None]  # (R, T)
        stream = {
            k: torch.cat(
                [v[real], (ids if k == "input_ids" else torch.zeros_like(ids))[inputs].to(v.dtype)]
            )[None]
            for k, v in batch.items()
            if v.shape == real.shape and k != "attention_mask"
        }  # (1, N)
        later = self.later_positions(start[owner], places)
        positions = torch.cat([positions[..., real], later[..., inputs]], -1).unsqueeze(
            -2
        )  # (3, 1, N)
        images = self.frozen_features(prompts)
        images |= {
            k: v
            for k, v in batch.items()
            if v.shape != real.shape and not (images and k == "pixel_values")
        }
        out = self.base(
            **stream,
            **images,
            position_ids=positions,
            attention_mask=ANY_MASK.to(self.device),
            use_cache=False,
            shared=PackedAttention(sizes, lengths, owner),
        ).last_hidden_state[0]
        ends, starts = sizes.cumsum(0), sizes.sum() + lengths.cumsum(0) - lengths
        before = torch.where(
            places == 0, ends[owner, None] - 1, starts[:, None] + places - 1
        )  # (R, T)
        return out[before[rows.argsort()][scored]]

    def plain_hidden(self, prompts, ids, mask, owner, scored):
        """The plain twin: R full rows [prompt | completion], each with its own copy of the image."""
        batch = collate([prompts[b] for b in owner])
        positions, start = self.positions(batch)
        later = self.later_positions(start, torch.arange(ids.shape[1], device=ids.device))
        length = batch["input_ids"].shape[1]
        batch |= {
            "input_ids": torch.cat([batch["input_ids"], ids], 1),
            "attention_mask": torch.cat([batch["attention_mask"], mask], 1),
            **{
                k: F.pad(v, (0, ids.shape[1]))
                for k, v in batch.items()
                if v.shape == batch["input_ids"].shape and k not in ("input_ids", "attention_mask")
            },
        }
        out = self.base(**batch, position_ids=torch.cat([positions, later], -1), use_cache=False)
        return out.last_hidden_state[:, length - 1 : -1][scored]

    # -- sharding

    def shard(self):
        """Spreads float32 weights, and with them gradients and optimiser states, over the processes: FSDP2 (Zhao et al. 2023)
        gathers one block at a time, in the forward's precision, and sums gradients in float32."""
        half = torch.bfloat16 if self.config.model.precision == "bfloat16" else None
        root = MixedPrecisionPolicy(
            reduce_dtype=torch.float32, cast_forward_inputs=False
        )  # embedding and head stay float32
        block = MixedPrecisionPolicy(
            param_dtype=half, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
        blocks = [m for m in self.model.modules() if isinstance(m, GradientCheckpointingLayer)]
        for module in reversed(blocks):
            fully_shard(module, mp_policy=block)
        fully_shard(self.model, mp_policy=root)
        # Which block the backward gathers ahead is said here: by default it follows the trace of past forwards, in which
        # sampling leaves other steps on every process.
        for before, module in zip([self.model, *blocks], [*blocks, self.model]):
            module.set_modules_to_backward_prefetch(
                [before if type(before) is type(module) else module]
            )
        self.model.run = lambda work: work()
        register_fsdp_forward_method(self.model, "run")
        self.sharded = True
        for part in self.parts():
            part.set_gradient_divide_factor(1.0)  # losses are shares of one global mean: their sum
            part.set_force_sum_reduction_for_comms(True)

    def parts(self):
        return [m for m in self.model.modules() if isinstance(m, FSDPModule)]

    @contextmanager
    def gathered(self):
        """Whole weights on every process (no effect unless sharded). What runs in here, without gradients, needs no other
        process: each decodes as many tokens and scores as many rows as it has."""
        if self.sharded:
            self.model.set_reshard_after_forward(False)
            self.model.run(lambda: None)  # the root first
        for part in self.parts() if self.sharded else ():
            part.unshard()
        yield
        for part in self.parts() if self.sharded else ():
            part.reshard()
        if self.sharded:
            self.model.set_reshard_after_forward(True)
            self.model.set_reshard_after_forward(
                False, recurse=False
            )  # the backward begins with it

    def together(self, batches):
        """The batches one by one. Where this process has none left, it stays `idle` as often as another one has further ones:
        sharded weights are gathered by all together."""
        most = max(gather_objects(len(batches))) if self.sharded else 0
        yield from batches
        for _ in range(most - len(batches)):
            self.idle()

    def idle(self):
        """Forward and backward without effect."""
        ids = torch.full((2,), int(self.stop_ids[0]), device=self.device)
        logp, _, _ = self.logprobs([dict(self.spare)], [[ids]])
        (0 * logp.sum()).backward()

    # -- adapters

    def add_lora(self, section):
        """Freezes the model and gives its linear layers that section.lora_targets names, none in the parts section.freeze, adapters:
        A from the seed, B = 0, which changes nothing yet."""
        linear = {
            name: layer
            for name, layer in self.model.named_modules()
            if isinstance(layer, torch.nn.Linear) and part_of(name) not in section.freeze
        }
        names = {name.rpartition(".")[2] for name in linear}
        if not section.lora_targets or set(section.lora_targets) - names:
            raise InputError(
                f"lora_targets={section.lora_targets}: the linear layers of {type(self.model).__name__} are {', '.join(sorted(names))}"
            )
        self.model.requires_grad_(False)
        self.adapted = {
            name: layer
            for name, layer in linear.items()
            if name.rpartition(".")[2] in section.lora_targets
        }
        generator = torch.Generator().manual_seed(self.config.seed)
        for layer in self.adapted.values():
            layer.__class__ = LoRALinear  # its weight keeps its name
            a = (
                torch.rand(section.lora_rank, layer.in_features, generator=generator)
                .mul_(2)
                .sub_(1)
                / layer.in_features**0.5
            )
            layer.lora_A = torch.nn.Parameter(a.to(layer.weight.device))
            layer.lora_B = torch.nn.Parameter(
                layer.weight.new_zeros(layer.out_features, section.lora_rank)
            )

    @contextmanager
    def without_adapters(self):
        """The model as it was before add_lora: the reference policy, without a second copy."""
        try:
            for layer in self.adapted.values():
                layer.on = False
            yield
        finally:
            for layer in self.adapted.values():
                layer.on = True

    def adapters(self):
        """{name in PEFT's files: parameter}"""
        return {
            f"base_model.model.{name}.{matrix}.weight": getattr(layer, matrix)
            for name, layer in self.adapted.items()
            for matrix in ("lora_A", "lora_B")
        }

    @torch.no_grad()
    def load_adapters(self, folder):
        saved = load_file(folder / "adapter_model.safetensors")
        for name, parameter in self.adapters().items():
            parameter.copy_(saved[name])

    @torch.no_grad()
    def merged(self):
        """The state dict of the model with its adapters added to the weights."""
        state = self.model.state_dict()
        for name, layer in self.adapted.items():
            state[f"{name}.weight"] = layer.weight + layer.scale * layer.lora_B @ layer.lora_A
            del state[f"{name}.lora_A"], state[f"{name}.lora_B"]
        return state

    # -- files

    def whole_weights(self):
        """(state dict with adapters merged, adapters), whole on the first process; all have to call it."""
        every, once = (
            {name for name, _ in self.model.named_parameters(remove_duplicate=again)}
            for again in (False, True)
        )
        state = {
            name: whole(tensor)
            for name, tensor in self.merged().items()
            if name not in every - once
        }  # a tied weight once
        return state, {name: whole(p.detach()) for name, p in self.adapters().items()}

    def save(self, folder, weights=None):
        """Writes model (adapters merged), tokenizer and image processor in Hugging Face format; adapters once more, for the
        model that they were added to, in the folder `adapter` and in PEFT's format. weights: from whole_weights."""
        transformers.utils.logging.disable_progress_bar()
        state, adapters = weights or self.whole_weights()
        self.model.save_pretrained(folder, state_dict=state)
        if self.adapted:
            lora_rank = len(next(iter(self.adapted.values())).lora_A)
            (folder / "adapter").mkdir()
            save_file(adapters, folder / "adapter" / "adapter_model.safetensors")
            (folder / "adapter" / "adapter_config.json").write_text(
                json.dumps(
                    {
                        "peft_type": "LORA",
                        "r": lora_rank,
                        "lora_alpha": LoRALinear.scale * lora_rank,
                        "target_modules": sorted(self.adapted),
                        "base_model_name_or_path": self.path,
                        "bias": "none",
                        "inference_mode": True,
                    }
                )
            )
        self.processor.save_pretrained(folder)
        video = "video_processor"
        if video in inspect.signature(type(self.processor)).parameters and not hasattr(
            self.processor, video
        ):
            images = (
                self.processor.image_processor
            )  # with torchvision, transformers looks for that half
            patch = {
                k: getattr(images, k)
                for k in ("patch_size", "temporal_patch_size", "merge_size")
                if hasattr(images, k)
            }
            Path(folder, "video_preprocessor_config.json").write_text(json.dumps(patch))


# ---------------------------------------------------------------------------------------------- loading


def image_only(family):
    """The processor class `family` without its video half, which cannot be built without torchvision."""

    class ImageOnly(family):
        @classmethod
        def get_attributes(cls):
            return [name for name in super().get_attributes() if name != "video_processor"]

    ImageOnly.__name__ = family.__name__  # which is what a saved folder says
    return ImageOnly


def load_policy(config, path=None, weights=True):
    """The policy in `path` (default: model.path): "tiny", a local model folder or a hub id. Without weights it can encode
    prompts and tell its size, at no cost. Raises InputError."""
    path = str(path or config.model.path)
    pixels = {"min_pixels": config.model.min_pixels, "max_pixels": config.model.max_pixels}
    if path == "tiny":
        return Policy(*build_tiny(config.seed, pixels), config, path)
    if not os.path.isdir(path) and (path.count("/") != 1 or path.startswith(("/", "."))):
        raise InputError(
            f"model {path!r}: no such folder, and not a hub id like Qwen/Qwen3-VL-2B-Instruct"
        )
    transformers.utils.logging.disable_progress_bar()
    try:
        if weights:
            model = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32)
        else:
            with torch.device("meta"):
                model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(path))
        images = AutoImageProcessor.from_pretrained(path, **pixels)
        if is_torchvision_available():
            processor = AutoProcessor.from_pretrained(path)
            processor.image_processor = images
        else:
            family = image_only(PROCESSOR_MAPPING[type(model.config)])
            settings, _ = family.get_processor_dict(path)
            processor = family.from_args_and_dict(
                [images, AutoTokenizer.from_pretrained(path)], settings
            )
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        RuntimeError,
        ImportError,
        SafetensorError,
    ) as error:
        raise InputError(
            f"model {path!r} cannot be loaded: {(str(error).strip() or repr(error)).splitlines()[0]}"
        ) from None
    if not hasattr(model.config, "image_token_id"):
        raise InputError(
            f"model {path!r}: {model.config.model_type} has no image_token_id, and is none of the families that work here"
        )
    if "max_pixels" not in images.valid_kwargs.__annotations__:
        say(
            f"model.min_pixels, model.max_pixels: no effect, the image sizes of {model.config.model_type} are its own"
        )
    processor.chat_template = processor.chat_template or processor.tokenizer.chat_template
    if not processor.chat_template:
        raise InputError(f"model {path!r} has no chat template: take an instruction-tuned one")
    return Policy(model, processor, config, path)


SPECIAL_TOKENS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
CHAT_TEMPLATE = """{%- for message in messages -%}
<|im_start|>{{ message.role }}
{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content -%}
{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}
{%- endfor %}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def build_tokenizer(vocabulary=1024):
    """A byte-level BPE tokenizer with Qwen's special tokens, trained on the phantoms' own texts."""
    import tokenizers  # comes with transformers

    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    words = tokenizers.Regex(
        r"\p{N}|[^\s\p{L}\p{N}]+| ?\p{L}+|\s+"
    )  # digits one by one, as in Qwen
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Split(words, "isolated"),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    corpus = data.phantom_corpus()
    tokenizer.train_from_iterator(
        corpus,
        tokenizers.trainers.BpeTrainer(
            vocab_size=vocabulary - len(SPECIAL_TOKENS),
            show_progress=False,
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=SPECIAL_TOKENS,
        padding_side="left",
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def build_tiny(seed, pixels):
    """A randomly initialised Qwen3-VL of 2.4 M parameters (deepstack on, 14-pixel patches merged 2x2) and its processor."""
    tokenizer = build_tokenizer()
    ids = {
        name: tokenizer.convert_tokens_to_ids(f"<|{name}|>")
        for name in ("endoftext", "im_end", "vision_start", "vision_end", "image_pad", "video_pad")
    }
    width, layers = 128, 3
    config = Qwen3VLConfig(
        text_config=dict(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=3 * width,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=4,
            head_dim=32,
            max_position_embeddings=4096,
            rope_parameters=dict(
                rope_type="default",
                rope_theta=10_000.0,
                mrope_section=[6, 5, 5],
                mrope_interleaved=True,
            ),
            eos_token_id=ids["im_end"],
            pad_token_id=ids["endoftext"],
            tie_word_embeddings=True,
        ),
        vision_config=dict(
            depth=3,
            hidden_size=128,
            intermediate_size=384,
            num_heads=4,
            patch_size=14,
            spatial_merge_size=2,
            temporal_patch_size=2,
            out_hidden_size=width,
            num_position_embeddings=256,
            deepstack_visual_indexes=[0, 1],
        ),
        image_token_id=ids["image_pad"],
        video_token_id=ids["video_pad"],
        vision_start_token_id=ids["vision_start"],
        vision_end_token_id=ids["vision_end"],
        tie_word_embeddings=True,
    )
    torch.manual_seed(seed)
    model = Qwen3VLForConditionalGeneration(config)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = (
        ids["im_end"],
        ids["endoftext"],
    )
    images = Qwen2VLImageProcessorPil(
        patch_size=14,
        temporal_patch_size=2,
        merge_size=2,
        image_mean=[0.4] * 3,
        image_std=[0.2] * 3,
        **pixels,
    )
    return model, image_only(Qwen3VLProcessor)(
        images, tokenizer, chat_template=tokenizer.chat_template
    )


# ---------------------------------------------------------------------------------------------- optimiser and checkpoints

PROJECTORS = (
    "visual.merger",
    "visual.deepstack_merger_list",
    "multi_modal_projector",
    "connector",
    "image_newline",
)
TOWERS = ("visual", "vision_tower", "vision_model")


def part_of(name):
    """ "vision" for the parameters of the vision tower, "projector" for those of what maps its features to the language model."""
    name = name.removeprefix("model.")
    return (
        "projector"
        if name.startswith(PROJECTORS)
        else "vision"
        if name.startswith(TOWERS)
        else None
    )


def make_optimizers(policy, section):
    """[AdamW] on float32 weights, with no decay on vectors (norms, biases). The parts in section.freeze stay as they are.

    optimizer=muon: [AdamW, Muon], where the weights of linear layers (the head apart) take Muon's orthogonalised steps
    (Jordan 2024), scaled to the size of AdamW's (Liu et al. 2025), so that one learning rate serves both.
    """
    parts = [(part_of(name), p) for name, p in policy.model.named_parameters()]
    if unknown := set(section.freeze) - {part for part, _ in parts}:
        raise InputError(
            f"freeze={section.freeze}: {type(policy.model).__name__} has no {' or '.join(unknown)} of a known name"
        )
    for part, p in parts:
        if part in section.freeze:
            p.requires_grad_(False)
    policy.vision_frozen = not any(p.requires_grad for part, p in parts if part) and any(
        part == "vision" for part, _ in parts
    )
    linear = {id(m.weight) for m in policy.model.modules() if isinstance(m, torch.nn.Linear)} - {
        id(policy.head[0])
    }
    linear = [p for p in policy.parameters() if section.optimizer == "muon" and id(p) in linear]
    others = [p for p in policy.parameters() if id(p) not in set(map(id, linear))]
    adamw = torch.optim.AdamW(
        [
            {"params": [p for p in others if p.ndim >= 2], "weight_decay": section.weight_decay},
            {"params": [p for p in others if p.ndim < 2], "weight_decay": 0.0},
        ],
        lr=section.lr,
        fused=True,
    )
    return [adamw] + (
        [torch.optim.Muon(linear, section.lr, section.weight_decay, adjust_lr_fn="match_rms_adamw")]
        if linear
        else []
    )


def optimizer_step(policy, optimizers, lr, grad_clip):
    """Sums gradients over processes (each holds its share of one global mean; sharded ones are summed by then), clips, steps.
    Returns the gradient norm; where that is not finite, nothing is updated."""
    for p in policy.parameters():  # a process without tokens still takes part
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        if world_size() > 1 and not policy.sharded:
            dist.all_reduce(p.grad)
    norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), grad_clip)
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr
        if norm.isfinite():  # else no update: it would destroy the weights
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return float(norm)


def bad_steps(before, norms, config, where):
    """How many of the latest optimiser steps in a row had no finite gradient; InputError at model.max_bad_steps."""
    for norm in norms:
        before = 0 if math.isfinite(norm) else before + 1
        if before >= config.model.max_bad_steps:
            raise InputError(
                f"{where}: {before} optimiser steps in a row had no finite gradient and changed nothing; go on from the last "
                f"checkpoint with a lower lr, or with model.precision=float32"
            )
    return before


def point(link, folder):
    """Makes the symbolic link `link` point to `folder` (beside it), atomically."""
    aside = link.with_name(link.name + ".new")
    aside.unlink(missing_ok=True)
    aside.symlink_to(folder.name)
    os.replace(aside, link)


def whole(tensor):
    """A tensor that may be sharded, whole on the first process: all have to call it. Elsewhere None."""
    if not isinstance(tensor, DTensor):
        return tensor
    tensor = tensor.full_tensor()
    return tensor.cpu() if rank() == 0 else None


def spread(state, optimizer):
    """An optimiser's saved state (a state_dict of whole tensors), sharded as its parameters are."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for i, values in state["state"].items():
        for name, value in values.items():
            if isinstance(parameters[i], DTensor) and value.shape == parameters[i].shape:
                values[name] = distribute_tensor(
                    value.to(parameters[i].device),
                    parameters[i].device_mesh,
                    parameters[i].placements,
                )
    return state


def save_checkpoint(run, step, policy, optimizers, is_best=False, **state):
    """Writes run/step_N beside, then renames it: it is there whole or not at all. `last` (and `best`) point to it.

    The folder is a Hugging Face model folder plus training_state.pt, the same whatever the number of processes and however
    weights are spread over them; older steps that nothing points to are removed.
    """
    final, aside = run / f"step_{step:06d}", run / f"step_{step:06d}.tmp"
    if not any(gather_objects(rank() == 0 and final.exists())):
        weights, states = (
            policy.whole_weights(),
            tree_map(whole, [o.state_dict() for o in optimizers]),
        )
        try:
            if rank() == 0:
                shutil.rmtree(aside, ignore_errors=True)
                aside.mkdir(parents=True)
                policy.save(aside, weights)
                torch.save(
                    {"step": step, "start": policy.start, "optimizers": states, **state},
                    aside / "training_state.pt",
                )
                os.rename(aside, final)
        except (
            OSError,
            RuntimeError,
            SafetensorError,
        ) as error:  # RuntimeError is torch.save's, of a full disk
            shutil.rmtree(aside, ignore_errors=True)
            raise InputError(
                f"{final} cannot be written ({(str(error) or repr(error)).splitlines()[0]}); the checkpoint before it is whole. If the disk "
                f"is full, make room; then start the same command again"
            ) from None
    if rank() == 0:
        for name in ["best", "last"] if is_best else ["last"]:
            point(run / name, final)
        keep = {(run / name).resolve().name for name in ("best", "last")}
        keep |= {
            path.name for path in sorted(run.glob("step_??????"))[-policy.config.log.keep_last :]
        }
        for old in [*run.glob("step_*")]:
            if old.name not in keep:
                gone = old.with_suffix(
                    ".tmp"
                )  # removed by halves, it must not look like a checkpoint
                if old != gone:
                    shutil.rmtree(gone, ignore_errors=True)
                    os.rename(old, gone)
                shutil.rmtree(gone, ignore_errors=True)
    gather_objects(None)


def last_step(run):
    """The step that run/last holds, 0 without one."""
    if not (run / "last").exists():
        return 0
    if not (run / "last").is_symlink():
        raise InputError(
            f"{run}/last is a folder where a link was: copy runs with their links (cp -a, rsync -a), or replace it by one to a step_N"
        )
    return int((run / "last").resolve().name.removeprefix("step_"))


def resume(run, config, start, section):
    """(policy, optimizers, state) of run/last, or of a fresh start from `start` (None: model.path) with state {"step": 0}.
    Adapters are trained on top of `start` as it is."""
    path = run / "last" if (run / "last").exists() else None
    policy = load_policy(config, start if section.lora_rank else path or start)
    policy.start = Path(start).resolve().name if start else ""
    if section.lora_rank:
        policy.add_lora(section)
        if path:
            policy.load_adapters(path / "adapter")
    if config.model.parallel == "shard" and world_size() > 1:
        policy.shard()
    optimizers = make_optimizers(policy, section)
    if path is None:
        return policy, optimizers, {"step": 0}
    state = torch.load(path / "training_state.pt", map_location="cpu", weights_only=True, mmap=True)
    if (
        began := state.pop("start", policy.start)
    ) != policy.start:  # it is the reference, and what adapters belong to
        raise InputError(
            f"{run} began at {began} of {Path(start).parent}, and {Path(start).name} is {policy.start} there by now; "
            f"point it back, or choose another folder with out=..."
        )
    for optimizer, saved in zip(optimizers, state.pop("optimizers"), strict=True):
        optimizer.load_state_dict(spread(saved, optimizer))
    return policy, optimizers, state


def open_run(run, config, sections):
    """Makes the run folder and its config.yaml; refuses a folder made with other settings in `sections`.

    What may change: how often to save, how much to do at once, how long GRPO runs, how much is evaluated.
    """
    text = data.config_text(config)
    free = (
        {"sft.more_steps"} if run.name != "more" else set()
    )  # in `more` it sets the learning rates
    free |= {
        "grpo.steps",
        "grpo.save_every",
        "grpo.micro_batch",
        "grpo.sample_batch",
        "sft.micro_batch",
        "sft.save_every",
        "data.val_size",
        "data.test_size",
        "data.on_error",
        "model.shared_prefix",
        "model.parallel",
        "model.gradient_checkpointing",
        "model.max_bad_steps",
    }
    path = run / "config.yaml"
    if path.exists() and (run / "last").exists():
        before = data.load_config(path)
        mine = [
            key
            for key in data.known_keys()
            if (key == "seed" or key.split(".")[0] in sections) and key not in free
        ]
        if changed := [key for key in mine if attrgetter(key)(before) != attrgetter(key)(config)]:
            raise InputError(
                f"{run} was made with "
                + ", ".join(
                    f"{key}={attrgetter(key)(before)} (now {attrgetter(key)(config)})"
                    for key in changed
                )
                + f"; choose another folder with out=..., or delete this one. What may change: {', '.join(sorted(free))}"
            )
    if rank() == 0:
        try:
            run.mkdir(parents=True, exist_ok=True)
            path.with_suffix(".new").write_text(text)
            os.replace(path.with_suffix(".new"), path)
        except OSError as error:
            raise InputError(f"out={config.out}: cannot write there ({error.strerror})") from None
    if len(set(gather_objects(last_step(run)))) > 1:
        raise InputError(
            f"{run}: processes find different checkpoints there; it has to be on a file system that all machines share"
        )


def step_of(line):
    """The step of a line of metrics.jsonl; of one that kill -9 has cut, infinity."""
    try:
        return json.loads(line)["step"]
    except ValueError:
        return float("inf")


class Log:
    """metrics.jsonl (and tensorboard or wandb when asked for); on resume, lines after the resumed step are dropped."""

    def __init__(self, run, step, config):
        self.files, self.board, self.wandb = {}, None, None
        if rank() != 0:
            return
        for name in ("metrics", "samples"):
            path = run / f"{name}.jsonl"
            lines = path.read_text().splitlines() if path.exists() else []
            kept = [line for line in lines if step_of(line) <= step]
            path.with_suffix(".new").write_text("".join(line + "\n" for line in kept))
            os.replace(path.with_suffix(".new"), path)
            self.files[name] = open(path, "a", buffering=1)
        try:
            if config.log.tensorboard:
                from torch.utils.tensorboard import SummaryWriter

                self.board = SummaryWriter(run)
            if config.log.wandb:
                import wandb

                self.wandb = wandb.init(
                    project="chest-xray-grpo", name=str(run), config=asdict(config)
                )
        except ImportError as error:
            raise InputError(
                f"log.tensorboard, log.wandb: {error}; install the package or leave the option off"
            ) from None

    def metrics(self, step, values):
        if rank() == 0:
            self.files["metrics"].write(json.dumps({"step": step, **values}) + "\n")
            for name, value in values.items():
                if self.board:
                    self.board.add_scalar(name, value, step)
            if self.wandb:
                self.wandb.log(values, step=step)

    def sample(self, step, row):
        if rank() == 0:
            self.files["samples"].write(json.dumps({"step": step, **row}) + "\n")


# ---------------------------------------------------------------------------------------------- what a run needs


def prompt_size(config, vision):
    """(patches, tokens) of a prompt whose images are as large as model.max_pixels allows, for a model's `vision_config`."""
    images = max(
        2 if source.source in ("iu_xray", "mimic_cxr") and source.views == "all" else 1
        for source in data.sources(config, "train")
    )
    patches = (
        images * config.model.max_pixels // int(np.max(getattr(vision, "patch_size", 14))) ** 2
    )  # InternVL's has two sides
    return patches, min(
        config.model.max_prompt_tokens,
        patches // getattr(vision, "spatial_merge_size", 2) ** 2 + 64,
    )


def memory_plan(policy, config, section, gpus=None):
    """Bytes that a process needs, by part, for a stage (config.sft or config.grpo) on `gpus` processes (None: those there are).
    The policy is ready to be trained (frozen weights, adapters) and needs no weights.

    The activations are those of a plain Qwen: what the backward of one layer keeps for a token, times layers and tokens;
    with gradient checkpointing its input only, and all of one layer. SFT counts 256 tokens of questions and answers a study.
    """
    model = policy.model
    text = model.config.get_text_config()
    hidden, wide, layers = text.hidden_size, text.intermediate_size, text.num_hidden_layers
    heads, shared_heads = (
        text.num_attention_heads,
        getattr(text, "num_key_value_heads", None) or text.num_attention_heads,
    )
    size = getattr(text, "head_dim", None) or hidden // heads
    a, k, b = heads * size, shared_heads * size, 2 if config.model.precision == "bfloat16" else 4
    total, trained = (
        sum(p.numel() for p in model.parameters() if p.requires_grad or everything)
        for everything in (True, False)
    )
    gpus = gpus or world_size()
    shares = gpus if config.model.parallel == "shard" else 1
    vision = getattr(model.config, "vision_config", None)
    patches, prompt = prompt_size(config, vision)
    grpo = section is config.grpo
    rows, length = (section.group_size, section.max_new_tokens) if grpo else (1, 256)  # an answer
    together = min(
        section.micro_batch, -(-(section.prompts if grpo else section.batch_size) // gpus)
    )
    tokens = together * (prompt + rows * length if policy.shared else rows * (prompt + length))
    per_token = (
        24 * hidden + 12 * (a + k) + b * 4 * (a + k + wide)
    )  # norms in float32; projections, attention, MLP
    activations = tokens * per_token * layers
    if config.model.gradient_checkpointing:
        activations = tokens * (4 * hidden * layers + per_token)
    if vision is not None and not policy.vision_frozen:
        depth, width = (
            getattr(vision, "depth", None) or vision.num_hidden_layers,
            vision.hidden_size,
        )
        per_patch = 4 * (12 * width + 4 * (getattr(vision, "intermediate_size", None) or 4 * width))
        kept = (
            4 * width * depth + per_patch
            if config.model.gradient_checkpointing
            else per_patch * depth
        )
        activations += together * patches * kept
    parts = {
        "weights": 4 * total / shares,
        "gradients": 4 * trained / shares,
        "optimizer": 8 * trained / shares,
        "activations": activations,
        "logits": 4 * BUFFER,
    }
    if b == 2 and shares == 1:
        parts["half-precision weights"] = 2 * total
    if shares > 1:
        blocks = [
            sum(p.numel() for p in m.parameters())
            for m in model.modules()
            if isinstance(m, GradientCheckpointingLayer)
        ]
        parts["gathered weights"] = 4 * (total - sum(blocks)) + b * (
            sum(blocks) if grpo else 2 * max(blocks)
        )  # GRPO: to sample
    if grpo:
        parts["keys and values"] = (
            min(section.sample_batch, -(-section.prompts // gpus))
            * (prompt + rows * length)
            * 2
            * k
            * layers
            * b
        )
        if section.kl_coef and not section.lora_rank:
            parts["reference"] = 4 * total / shares
    return parts


def memory_text(parts):
    """One line: the sum in GB and its parts, the largest first."""
    parts = sorted(parts.items(), key=lambda part: -part[1])
    return f"about {sum(n for _, n in parts) / 1e9:.1f} GB per process: " + ", ".join(
        f"{name} {n / 1e9:.1f}" for name, n in parts
    )


def plan(config, gpus=1):
    """python model.py plan CONFIG --gpus N: memory of both stages, without loading the weights."""
    lines = [f"model.parallel={config.model.parallel} on {gpus} GPU{'s' * (gpus > 1)}"]
    for name, section in (("SFT", config.sft), ("GRPO", config.grpo)):
        policy = load_policy(config, weights=False)
        if section.lora_rank:
            policy.add_lora(section)
        make_optimizers(policy, section)
        size, trained = (
            sum(p.numel() for p in some) / 1e6
            for some in (policy.model.parameters(), policy.parameters())
        )
        lines.append(
            f"{name}: {trained:.1f} of {size:.1f} M parameters trained; {memory_text(memory_plan(policy, config, section, gpus))}"
        )
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------- processes and signals


def main():
    parser = argparse.ArgumentParser(description="Says what a run would need, without its weights.")
    parser.add_argument("command", choices=["plan"])
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--gpus", type=int, default=1)
    args = parser.parse_args()
    print(plan(data.load_config(args.config, args.overrides), args.gpus))


def start(usage):
    """Reads the command line `CONFIG [key=value ...]`, joins the other processes, prints the resolved configuration.

    Returns (config, stop request)."""
    parser = argparse.ArgumentParser(
        description=usage, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value")
    args = parser.parse_args()
    config = data.load_config(args.config, args.overrides)
    setup()
    stop = StopRequest()
    say(data.config_text(config))
    return config, stop


def setup():
    """Joins the other processes that torchrun started, if any."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        if torch.cuda.is_available():
            if int(os.environ["LOCAL_RANK"]) >= torch.cuda.device_count():
                raise InputError(
                    f"--nproc_per_node is more than the {torch.cuda.device_count()} GPUs of this machine"
                )
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group(
            "nccl" if torch.cuda.is_available() else "gloo", timeout=timedelta(hours=2)
        )


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def gather_objects(value):
    """[value of rank 0, value of rank 1, ...]; waits until all have come here."""
    values = [value] * world_size()
    if dist.is_initialized():
        try:
            dist.all_gather_object(values, value)
        except RuntimeError as error:
            raise InputError(
                f"another process has stopped, see its message ({str(error).splitlines()[0]})"
            ) from None
    return values


def say(text):
    """Prints on the first process, above any progress bar."""
    if rank() == 0:
        tqdm.write(text)
        sys.stdout.flush()


class StopRequest:
    """SIGTERM or Ctrl-C asks to stop after the current step; a second one ends the process at once."""

    def __init__(self):
        self.asked = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.handle)

    def handle(self, number, _frame):
        self.asked = True
        # torchrun passes a Ctrl-C on to processes that have seen it already, and kills them after 30 seconds.
        if not dist.is_torchelastic_launched():
            signal.signal(number, signal.SIG_DFL)

    def __bool__(self):
        """True on every process as soon as one was asked. Collective: all processes ask equally often."""
        return any(gather_objects(self.asked))

    def release(self):
        """From here on, where nothing is left to be saved, a signal ends the process at once."""

        def leave(*_):
            if rank() == 0:
                os.write(1, b"\nstopped while evaluating; the same command evaluates again\n")
            os._exit(0)

        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, leave)

    def finish(self):
        """On the way out there is nothing to stop (and Python would put the default handlers back while it ends)."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)


if __name__ == "__main__":
    data.run_main(main)
