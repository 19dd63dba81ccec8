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
    mask: Tensor  # (T, P + T): what a token attends to

    @property
    def size(self):
        """The tokens of the block in the stream."""
        if self.unpad_index is None:
            return len(self.prompt_index) * len(self.mask)
        return len(self.unpad_index)


class SharedPrefix:
    """Attention in one stream [prompt 1 | .. | prompt B | row 1 | .. | row R] without padding.

    A prompt attends causally to itself, a row to its prompt and causally to itself.
    """

    def __init__(self, prompt_lengths, row_lengths, owner):
        """Token counts (B,) and (R,), and the prompt of each row, owner (R,).

        Prompts are sorted by length, rows by the length of their prompts and then by their own: so
        what attends together stands together.
        """
        lengths, counts = prompt_lengths.unique_consecutive(return_counts=True)
        self.prompt_blocks = list(zip(counts.tolist(), lengths.tolist()))
        self.row_blocks = []
        first = 0
        for block, (count, length) in enumerate(self.prompt_blocks):
            rows = ((owner >= first) & (owner < first + count)).nonzero()[:, 0]
            # Rows of similar length: little padding.
            for chosen in rows.tensor_split(min(4, len(rows) // MIN_ROWS_TO_SPLIT + 1)):
                own = row_lengths[chosen]
                if len(own) and own.max() > 0:
                    prompt_index = owner[chosen] - first
                    self.row_blocks.append(row_block(block, prompt_index, length, own))
            first += count
        self.sizes = [count * length for count, length in self.prompt_blocks]
        self.sizes += [block.size for block in self.row_blocks]

    def attend(self, query, key, value, scaling):
        """query (1, H, N, d), key and value (1, h, N, d) of the stream -> (1, N, H, d)."""
        heads, shared_heads = query.shape[1], key.shape[1]
        if query.is_cuda and heads != shared_heads:
            # Its fast kernels take a mask or grouped heads, not both.
            key = key.repeat_interleave(heads // shared_heads, 1)
            value = value.repeat_interleave(heads // shared_heads, 1)
        options = {"scale": scaling, "enable_gqa": query.shape[1] != key.shape[1]}

        pieces = [t[0].transpose(0, 1).split(self.sizes) for t in (query, key, value)]
        pieces = list(zip(*pieces))  # of each block (n, H | h, d)
        prompts, outs = [], []
        for (count, _), piece in zip(self.prompt_blocks, pieces):
            q, k, v = (split_rows(t, count) for t in piece)
            prompts.append((k, v))
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, **options)
            outs.append(join_rows(out))
        for block, piece in zip(self.row_blocks, pieces[len(prompts) :]):
            outs.append(attend_rows(block, piece, prompts[block.prompt_block], options))
        return torch.cat(outs)[None]


def row_block(prompt_block, prompt_index, length, own):
    """The block of rows of lengths own (r,) after prompts of `length` tokens."""
    places = torch.arange(int(own.max()), device=own.device)  # (T,)
    real = places < own[:, None]  # (r, T)
    unpad_index = None if real.all() else real.flatten().nonzero()[:, 0]
    causal = places <= places[:, None]
    mask = F.pad(causal, (length, 0), value=True)  # (T, P + T)
    return RowBlock(prompt_block, prompt_index, unpad_index, mask)


def attend_rows(block, piece, prompt, options):
    """Attention of the rows of a block to their prompts' keys and values and to themselves."""
    count = len(block.prompt_index)
    if block.unpad_index is not None:
        padded = (count * len(block.mask),)
        piece = [
            t.new_zeros(padded + t.shape[1:]).index_copy(0, block.unpad_index, t) for t in piece
        ]
    q, k, v = (split_rows(t, count) for t in piece)  # (r, H | h, T, d)
    past_k, past_v = (rows_of(t, block.prompt_index) for t in prompt)  # (r, h, P, d)
    k = torch.cat([past_k, k], 2)
    v = torch.cat([past_v, v], 2)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=block.mask, **options)
    out = join_rows(out)
    return out if block.unpad_index is None else out.index_select(0, block.unpad_index)


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


def shared_hidden(policy, prompts, ids, mask, owner, scored):
    """Hidden states (N, H) that predict the scored tokens, from one stream of all prompts and rows.

    ids, mask, scored (R, T): completions, their real tokens, and those that are scored; owner (R,):
    the prompt of each. A row's last token predicts nothing and is left out of the stream.
    """
    # Sort as SharedPrefix wants it.
    sizes = torch.tensor([len(p) for p in prompts], device=ids.device)  # (B,)
    order = sizes.argsort(stable=True)
    prompts = [prompts[b] for b in order]
    owner = order.argsort()[owner]
    sizes = sizes[order]
    lengths = mask.sum(1) - 1
    rows = (sizes[owner] * ids.shape[1] + lengths).argsort(stable=True)
    ids, owner, lengths = ids[rows], owner[rows], lengths[rows]

    # The stream. Text that follows the prompt has 0 in every other token-shaped input.
    tokens, images = policy.batch(prompts)
    positions, start = policy.positions(tokens, images)
    real = tokens.pop("attention_mask").bool()  # (B, P)
    places = torch.arange(ids.shape[1], device=ids.device)  # (T,)
    inputs = places < lengths[:, None]  # (R, T)
    stream = {}
    for name, values in tokens.items():
        rest = ids if name == "input_ids" else torch.zeros_like(ids, dtype=values.dtype)
        stream[name] = torch.cat([values[real], rest[inputs]])[None]  # (1, N)
    later = policy.later_positions(start[owner], places)
    positions = torch.cat([positions[..., real], later[..., inputs]], -1).unsqueeze(-2)

    hidden = policy.base(
        **stream,
        **images,
        position_ids=positions,
        # A 4-D mask is passed on untouched, and SharedPrefix needs none.
        attention_mask=torch.ones(1, 1, 1, 1, dtype=torch.bool, device=ids.device),
        use_cache=False,
        shared=SharedPrefix(sizes, lengths, owner),
    ).last_hidden_state[0]

    # A first token is predicted by the end of its prompt, the others by the token before.
    ends = sizes.cumsum(0)
    starts = sizes.sum() + lengths.cumsum(0) - lengths
    predictors = torch.where(places == 0, ends[owner, None] - 1, starts[:, None] + places - 1)
    return hidden[predictors[rows.argsort()][scored]]
