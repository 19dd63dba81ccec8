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
        lengths, counts = prompt_lengths.unique_consecutive(return_counts=True)
        self.prompt_blocks = list(zip(counts.tolist(), lengths.tolist()))
        self.row_blocks = []
        first = 0
        for block, (count, length) in enumerate(self.prompt_blocks):
            after = (owner >= first) & (owner < first + count)
            rows = after.nonzero()[:, 0]
            # Rows of similar length: little padding.
            parts = min(4, len(rows) // MIN_ROWS_TO_SPLIT + 1)
            for chosen in rows.tensor_split(parts):
                own = row_lengths[chosen]
                if own.sum() > 0:
                    index = owner[chosen] - first
                    self.row_blocks.append(row_block(block, index, length, own, device))
            first += count
        self.sizes = [count * length for count, length in self.prompt_blocks]
        self.sizes += [block.size for block in self.row_blocks]

    def attend(self, query, key, value, scaling):
        """query (1, H, N, d), key and value (1, h, N, d) of the stream -> (1, N, H, d)."""
        groups = query.shape[1] // key.shape[1]
        if query.is_cuda and groups > 1:
            # Its fast kernels take a mask or grouped heads, not both.
            key = key.repeat_interleave(groups, 1)
            value = value.repeat_interleave(groups, 1)
        grouped = query.shape[1] != key.shape[1]
        options = {"scale": scaling, "enable_gqa": grouped}

        # Of each block (n, H | h, d).
        queries, keys, values = (self.split(t) for t in (query, key, value))
        blocks = list(zip(queries, keys, values))
        n_prompts = len(self.prompt_blocks)
        prompts = []
        outs = []
        for (count, _), block in zip(self.prompt_blocks, blocks):
            q, k, v = (split_rows(t, count) for t in block)
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, **options)
            outs.append(join_rows(out))
            prompts.append((k, v))
        for rows, block in zip(self.row_blocks, blocks[n_prompts:]):
            prompt = prompts[rows.prompt_block]
            outs.append(attend_rows(rows, block, prompt, options))
        return torch.cat(outs)[None]

    def split(self, stream):
        """(1, H, N, d) -> of each block (n, H, d)."""
        return stream[0].transpose(0, 1).split(self.sizes)


def row_block(prompt_block, prompt_index, length, own, device):
    """The block of rows of lengths own (r,) after prompts of `length` tokens."""
    places = torch.arange(int(own.max()))  # (T,)
    real = places < own[:, None]  # (r, T)
    unpad_index = None
    if not real.all():
        unpad_index = real.flatten().nonzero()[:, 0].to(device)
    causal = places <= places[:, None]
    mask = F.pad(causal, (length, 0), value=True)  # (T, P + T)
    size = int(own.sum())
    return RowBlock(prompt_block, prompt_index.to(device), unpad_index, mask.to(device), size)


def attend_rows(rows, block, prompt, options):
    """Attention of the rows of a block to their prompts' keys and values and to themselves."""
    count = len(rows.prompt_index)
    if rows.unpad_index is not None:
        length = count * len(rows.mask)
        block = [pad_stream(t, rows.unpad_index, length) for t in block]
    q, k, v = (split_rows(t, count) for t in block)  # (r, H | h, T, d)
    past_k, past_v = (rows_of(t, rows.prompt_index) for t in prompt)  # (r, h, P, d)
    k = torch.cat([past_k, k], 2)
    v = torch.cat([past_v, v], 2)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=rows.mask, **options)
    out = join_rows(out)
    if rows.unpad_index is None:
        return out
    return out.index_select(0, rows.unpad_index)


def pad_stream(stream, index, length):
    """The tokens of a stream (n, H, d) at their places in (length, H, d)."""
    padded = stream.new_zeros(length, *stream.shape[1:])
    return padded.index_copy(0, index, stream)


def rows_of(prompts, prompt_index):
    """The prompt of each row, (b, ..) -> (r, ..). One prompt alone needs no copies."""
    if len(prompts) == 1:
        return prompts.expand(len(prompt_index), -1, -1, -1)
    return prompts.index_select(0, prompt_index)


def split_rows(stream, count):
    """(count * n, H, d) -> (count, H, n, d)"""
    return stream.unflatten(0, (count, -1)).transpose(1, 2)


def join_rows(rows):
    """The way back: (count, H, n, d) -> (count * n, H, d)."""
    return rows.transpose(1, 2).flatten(0, 1)


def shared_hidden(policy, prompts, rows, owner, scored):
    """Hidden states (N, H) that predict the scored tokens, from one stream of all prompts and rows.

    rows: R completions (T_r,), owner: the prompt of each, scored (R, T) on the CPU. A row's last
    token predicts nothing and is left out of the stream.
    """
    # Sort as SharedPrefix wants it. All sizes are known on the CPU, so the GPU is not waited for.
    prompt_order = sorted(range(len(prompts)), key=lambda b: len(prompts[b]))
    row_order = sorted(range(len(rows)), key=lambda r: (len(prompts[owner[r]]), len(rows[r])))
    owner = [prompt_order.index(owner[r]) for r in row_order]
    prompts = [prompts[b] for b in prompt_order]
    rows = [rows[r][:-1] for r in row_order]
    sizes = torch.tensor([len(p) for p in prompts])
    lengths = torch.tensor([len(row) for row in rows])

    # The stream. Text that follows the prompts has 0 in every other token-shaped input.
    ids = torch.cat(rows)[None]
    tokens = {}
    for name in prompts[0].tokens:
        before = torch.cat([p.tokens[name] for p in prompts], 1)
        after = ids if name == "input_ids" else torch.zeros_like(ids)
        tokens[name] = torch.cat([before, after], 1)  # (1, N)
    # A 4-D mask is passed on untouched, and SharedPrefix needs none.
    tokens["attention_mask"] = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=ids.device)
    before = torch.cat([p.positions for p in prompts], -1)
    after = [prompts[b].next_position + torch.arange(len(row)) for b, row in zip(owner, rows)]
    after = torch.cat(after).to(ids.device).expand(*before.shape[:-1], -1)
    tokens["position_ids"] = torch.cat([before, after], -1)
    shared = SharedPrefix(sizes, lengths, torch.tensor(owner), ids.device)
    hidden = policy.run(prompts, tokens, use_cache=False, shared=shared).last_hidden_state[0]

    # A first token is predicted by the end of its prompt, the others by the token before.
    ends = sizes.cumsum(0)[owner] - 1  # (R,)
    starts = sizes.sum() + lengths.cumsum(0) - lengths
    places = torch.arange(scored.shape[1])
    by_row = torch.where(places == 0, ends[:, None], starts[:, None] + places - 1)
    predictors = torch.empty_like(by_row)
    predictors[row_order] = by_row
    return hidden.index_select(0, predictors[scored].to(ids.device))
