"""Scoring with every prompt once: equal to Policy.plain_hidden in model.py (tests/test_model.py).

  plain: G rows                   shared: one stream
  [image question | c1 ......]    [image question | c1 ...... | c2 .. | c3 ....]
  [image question | c2 ..    ]
  [image question | c3 ....  ]    attention     to prompt   c1   c2   c3
                                  of prompt         \\
                                  of c1             #        \\
                                  of c2             #             \\
                                  of c3             #                  \\

                                  # all of it   \\ causal   blank: not computed

Two prompts with 3 and 1 completions make [prompt 1 | prompt 2 | c1 | c2 | c3 | d1]. Prompts of one
length attend together as a block, and so do completions of similar length after one block.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

# From this many completions on, the long and the short ones of a block attend apart.
MIN_ROWS_TO_SPLIT = 12


@torch.compiler.disable  # what follows depends on the batch: with model.compile, run as it is
def shared_attention(
    module, query, key, value, attention_mask, scaling=None, shared=None, **options
):
    """An attention function of transformers, which passes on `shared` from the forward's arguments.

    query (B, H, L, d), key and value (B, h, L, d) -> (B, L, H, d).
    """
    if shared is None:
        sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]
        return sdpa(module, query, key, value, attention_mask, scaling=scaling, **options)
    return shared.attend(query, key, value, scaling), None


ALL_ATTENTION_FUNCTIONS.register("shared", shared_attention)
ALL_MASK_ATTENTION_FUNCTIONS.register("shared", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])


@dataclass
class RowBlock:
    """r rows of similar length T after prompts of one block, of length P."""

    prompt_block: int
    prompt_index: Tensor  # (r,): the prompt of each row, within its block
    unpad_index: Tensor | None  # of the real tokens among r * T; None: all are real
    mask: Tensor  # (T, P + T): which tokens a token attends to
    size: int  # tokens of the block in the stream


class SharedPrefix:
    """Attention in one stream [prompt 1 | .. | prompt B | row 1 | .. | row R] without padding.

    A prompt attends causally to itself, a row to its prompt and causally to itself.
    """

    def __init__(self, prompt_lengths, row_lengths, owner, device):
        """Token counts (B,) and (R,), and the prompt of each row, owner (R,): tensors on the CPU.

        Prompts are sorted by length, rows by the length of their prompts and then by their own: so
        what attends together stands together.
        """
        self.prompt_blocks = []  # how many prompts, of which length
        self.row_blocks = []
        self.sizes = []  # tokens of each block
        first = 0
        lengths, counts = prompt_lengths.unique_consecutive(return_counts=True)
        # A block for the prompts of each length.
        for length, count in zip(lengths.tolist(), counts.tolist()):
            after = (owner >= first) & (owner < first + count)
            (rows,) = after.nonzero(as_tuple=True)
            # Rows of similar length: little padding.
            parts = len(rows) // MIN_ROWS_TO_SPLIT + 1
            for chosen in rows.tensor_split(min(4, parts)):
                own = row_lengths[chosen]
                # Rows of one token are predicted by their prompts alone.
                if own.sum() > 0:
                    block = len(self.prompt_blocks)
                    index = owner[chosen] - first
                    rows_of_block = row_block(block, index, length, own, device)
                    self.row_blocks.append(rows_of_block)
            self.prompt_blocks.append((count, length))
            self.sizes.append(count * length)
            first += count
        self.sizes += [block.size for block in self.row_blocks]

    def attend(self, query, key, value, scaling):
        """query (1, H, N, d), key and value (1, h, N, d) of the stream -> (1, N, H, d)."""
        # Query heads that share a head of keys.
        groups = query.shape[1] // key.shape[1]
        if query.is_cuda and groups > 1:
            # Its fast kernels take a mask or grouped heads, not both.
            key = key.repeat_interleave(groups, 1)
            value = value.repeat_interleave(groups, 1)
            groups = 1
        options = {"scale": scaling, "enable_gqa": groups > 1}

        # Of each block (n, H | h, d).
        queries = self.split(query)
        keys = self.split(key)
        values = self.split(value)
        blocks = list(zip(queries, keys, values))
        # The prompts first, because the rows need their keys and values.
        prompts = []
        outs = []
        for count, _ in self.prompt_blocks:
            block = blocks[len(outs)]
            q, k, v = (split_rows(t, count) for t in block)
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, **options)
            out = join_rows(out)
            outs.append(out)
            prompts.append((k, v))
        for rows in self.row_blocks:
            block = blocks[len(outs)]
            prompt = prompts[rows.prompt_block]
            out = attend_rows(rows, block, prompt, options)
            outs.append(out)
        return torch.cat(outs)[None]

    def split(self, stream):
        """(1, H, N, d) -> of each block (n, H, d)."""
        tokens = stream[0].transpose(0, 1)
        return tokens.split(self.sizes)


def row_block(prompt_block, prompt_index, length, own, device):
    """The block of rows of lengths own (r,) after prompts of `length` tokens."""
    # On the CPU, where the lengths are known.
    places = torch.arange(int(own.max()))  # (T,)
    real = places < own[:, None]  # (r, T)
    unpad_index = None
    if not real.all():
        (unpad_index,) = real.flatten().nonzero(as_tuple=True)
        unpad_index = unpad_index.to(device, non_blocking=True)
    causal = places <= places[:, None]
    # All of its prompt.
    before = length, 0
    mask = F.pad(causal, before, value=True)  # (T, P + T)
    mask = mask.to(device, non_blocking=True)
    prompt_index = prompt_index.to(device, non_blocking=True)
    size = int(own.sum())
    return RowBlock(prompt_block, prompt_index, unpad_index, mask, size)


def attend_rows(rows, block, prompt, options):
    """Attention of the rows of a block to their prompts' keys and values and to themselves."""
    count = len(rows.prompt_index)
    # Kernels want rows of one length.
    if rows.unpad_index is not None:
        length = count * len(rows.mask)
        block = [pad_stream(t, rows.unpad_index, length) for t in block]
    q, k, v = (split_rows(t, count) for t in block)  # (r, H | h, T, d)
    past_k, past_v = prompt  # (b, h, P, d)
    # Each row meets its prompt's keys before its own.
    past_k = rows_of(past_k, rows.prompt_index)
    past_v = rows_of(past_v, rows.prompt_index)
    k = torch.cat([past_k, k], 2)
    v = torch.cat([past_v, v], 2)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=rows.mask, **options)
    out = join_rows(out)
    if rows.unpad_index is None:
        return out
    return out.index_select(0, rows.unpad_index)


def pad_stream(stream, index, length):
    """The tokens of a stream (n, H, d) at their places in (length, H, d)."""
    _, heads, width = stream.shape
    padded = stream.new_zeros(length, heads, width)
    return padded.index_copy(0, index, stream)


def rows_of(prompts, prompt_index):
    """The prompt of each row, (b, ..) -> (r, ..). One prompt alone needs no copies."""
    count = len(prompt_index)
    if len(prompts) == 1:
        return prompts.expand(count, -1, -1, -1)
    return prompts.index_select(0, prompt_index)


def split_rows(stream, count):
    """(count * n, H, d) -> (count, H, n, d)"""
    rows = stream.unflatten(0, (count, -1))
    return rows.transpose(1, 2)


def join_rows(rows):
    """The way back: (count, H, n, d) -> (count * n, H, d)."""
    return rows.transpose(1, 2).flatten(0, 1)


def shared_hidden(policy, prompts, rows, owner, scored):
    """Hidden states (N, H) that predict the scored tokens, from one stream of all prompts and rows.

    rows: R completions (T_r,), owner: the prompt of each, scored (R, T) on the CPU. A row's last
    token predicts nothing and is left out of the stream.
    """

    def prompt_size(b):
        return len(prompts[b])

    def sizes_of(r):
        prompt = prompts[owner[r]]
        return len(prompt), len(rows[r])

    # Sort as SharedPrefix wants it. All sizes are known on the CPU, so the GPU is not waited for.
    prompt_order = sorted(range(len(prompts)), key=prompt_size)
    row_order = sorted(range(len(rows)), key=sizes_of)
    # A row's last token predicts nothing.
    sorted_prompts = [prompts[b] for b in prompt_order]
    sorted_rows = [rows[r][:-1] for r in row_order]
    owners = [owner[r] for r in row_order]
    sorted_owner = [prompt_order.index(b) for b in owners]

    lengths = [len(p) for p in sorted_prompts]
    row_lengths = [len(row) for row in sorted_rows]
    lengths = torch.tensor(lengths)
    row_lengths = torch.tensor(row_lengths)
    index = torch.tensor(sorted_owner)
    # What goes to the GPU goes before the forward: later, a copy would wait for it.
    count, longest = scored.shape
    predictors = torch.empty(count, longest, dtype=torch.long)
    predictors[row_order] = predictor_places(lengths, row_lengths, index, longest)
    chosen = predictors[scored]
    chosen = chosen.to(policy.device, non_blocking=True)
    shared = SharedPrefix(lengths, row_lengths, index, policy.device)
    stream = stream_inputs(sorted_prompts, sorted_rows, sorted_owner)
    out = policy.run(sorted_prompts, stream, use_cache=False, shared=shared)
    hidden = out.last_hidden_state[0]  # (tokens of the stream, H)

    return hidden.index_select(0, chosen)


def stream_inputs(prompts, rows, owner):
    """The token inputs (1, N) of the stream, its positions, and a mask that masks nothing."""
    ids = torch.cat(rows)[None]
    # Text that follows the prompts has 0 in every other token-shaped input.
    nothing = torch.zeros_like(ids)
    stream = {}
    for name in prompts[0].tokens:
        parts = [p.tokens[name] for p in prompts]
        parts.append(ids if name == "input_ids" else nothing)
        stream[name] = torch.cat(parts, 1)
    # A 4-D mask is passed on untouched, and SharedPrefix needs none.
    stream["attention_mask"] = ids.new_ones(1, 1, 1, 1, dtype=torch.bool)

    after = []
    for b, row in zip(owner, rows):
        places = torch.arange(len(row))
        after.append(prompts[b].next_position + places)
    after = torch.cat(after)
    after = after.to(ids.device, non_blocking=True)
    before = [p.positions for p in prompts]
    before = torch.cat(before, -1)
    # With M-RoPE, text has the same position on all three axes.
    axes = before.shape[:-1]
    after = after.expand(*axes, -1)
    stream["position_ids"] = torch.cat([before, after], -1)
    return stream


def predictor_places(lengths, row_lengths, owner, longest):
    """The place in the stream of the token that predicts each token of each row, (R, longest).

    lengths (B,) of the prompts and row_lengths (R,) in the stream, owner (R,).
    """
    # A first token is predicted by the end of its prompt, the others by the token before.
    ends = lengths.cumsum(0) - 1
    firsts = row_lengths.cumsum(0) - row_lengths
    firsts = lengths.sum() + firsts
    places = torch.arange(longest)
    before = firsts[:, None] + places - 1
    is_first = places == 0
    return torch.where(is_first, ends[owner, None], before)
