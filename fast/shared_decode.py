"""Sampling with every prompt's keys and values once: equal to PlainDecoder in model.py.

Compared in tests/test_model.py. The rows of a prompt meet its keys in one product, so rows are laid
out in a grid of slots, as many for each prompt as the one with the most rows needs. Two prompts
with 3 and 1 rows left, R = 4:

  rows   owner     slots                       group_by_prompt: (R, h, n, d) -> (B, h, 3 n, d)
  c1     0         | c1 | c2 | c3 |            ungroup:         the way back
  c2     0         | d1 | -  | -  |
  c3     0
  d1     1         empty slots hold zeros
"""

import torch
from torch.nn import functional as F  # noqa: N812

KV_GROWTH = 64  # tokens by which the keys and values of the completions grow at a time


def rms_norm(layer, x):
    """A normalisation layer of a Qwen-VL model, in one call."""
    return F.rms_norm(x.float(), x.shape[-1:], layer.weight.float(), layer.variance_epsilon)


def autocast_once(tensor):
    """As autocast casts an operand: what many products read is better cast once."""
    device = tensor.device.type
    if torch.is_autocast_enabled(device):
        return tensor.to(torch.get_autocast_dtype(device))
    return tensor


class SharedDecoder:
    """One new token for each of R completions through the text layers of a Qwen-VL model.

    That is all that its forward does once the images are in.
    """

    def __init__(self, base, cache, mask, start, group_size):
        """The prompts' cache, (B, h, P, d) a layer, mask (B, P) and next positions start (B,)."""
        self.text, self.length = base.language_model, 0
        self.start = start.repeat_interleave(group_size)  # (R,)
        self.prompts = [
            (autocast_once(layer.keys), autocast_once(layer.values)) for layer in cache.layers
        ]
        self.own = [
            tuple(t[:, :, :0].repeat_interleave(group_size, 0) for t in layer)
            for layer in self.prompts
        ]  # (R, h, 0, d)
        bias = torch.zeros(mask.shape, device=mask.device)
        self.bias = bias.masked_fill(mask == 0, -torch.inf)[:, None, None]  # (B, 1, 1, P)
        prompts = torch.arange(len(mask), device=mask.device)
        self.assign_slots(prompts.repeat_interleave(group_size))

    def assign_slots(self, owner):
        """owner (R,), ascending: the prompt of each row."""
        # Which of its prompt's rows a row is.
        place = torch.arange(len(owner), device=owner.device) - torch.searchsorted(owner, owner)
        self.owner = owner
        self.slots = int(place.max()) + 1
        full = len(owner) == len(self.bias) * self.slots
        self.slot_of_row = None if full else owner * self.slots + place

    def keep_rows(self, live):
        """Drop all rows but `live` (R,), and prompts without any."""
        rows = live.nonzero()[:, 0]
        self.start = self.start[rows]
        self.own = [tuple(t.index_select(0, rows) for t in layer) for layer in self.own]
        prompts, owner = self.owner[rows].unique(return_inverse=True)
        if len(prompts) < len(self.bias):
            self.prompts = [
                tuple(t.index_select(0, prompts) for t in layer) for layer in self.prompts
            ]
            self.bias = self.bias[prompts]
        self.assign_slots(owner)

    def group_by_prompt(self, rows):
        """(R, h, n, d) -> (B, h, slots * n, d)"""
        if self.slot_of_row is not None:
            empty = rows.new_zeros(len(self.bias) * self.slots, *rows.shape[1:])
            rows = empty.index_copy_(0, self.slot_of_row, rows)
        return rows.unflatten(0, (-1, self.slots)).transpose(1, 2).flatten(2, 3)

    def ungroup(self, slots):
        """(B, h, slots * n, d) -> (R, h, n, d)"""
        rows = slots.unflatten(2, (self.slots, -1)).transpose(1, 2).flatten(0, 1)
        return rows if self.slot_of_row is None else rows.index_select(0, self.slot_of_row)

    def step(self, tokens):
        """The last hidden states (R, H) after tokens (R,)."""
        rotary = self.text.rotary_emb
        # Text has the same position on all axes of M-RoPE.
        positions = self.start + self.length
        angles = positions[:, None, None] * rotary.inv_freq  # (R, 1, d / 2)
        cos = angles.cos() * rotary.attention_scaling
        sin = angles.sin() * rotary.attention_scaling
        rotation = torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)
        x = self.text.embed_tokens(tokens)
        for i, layer in enumerate(self.text.layers):
            x = x + self.attend(i, layer.self_attn, rms_norm(layer.input_layernorm, x), *rotation)
            x = x + layer.mlp(rms_norm(layer.post_attention_layernorm, x))
        self.length += 1
        return rms_norm(self.text.norm, x)

    def attend(self, i, layer, x, cos, sin):
        """x (R, H) -> (R, H). The new keys and values join those of layer i."""
        size = layer.head_dim
        q, k, v = (
            project(x).view(len(x), -1, size)
            for project in (layer.q_proj, layer.k_proj, layer.v_proj)
        )  # (R, H | h, d)
        if hasattr(layer, "q_norm"):  # Qwen3
            q = rms_norm(layer.q_norm, q)
            k = rms_norm(layer.k_norm, k)
        q, k = (torch.addcmul(t * cos, t.roll(size // 2, -1), sin) for t in (q, k))
        own_k, own_v = self.append(i, k, v)
        past_k, past_v = self.prompts[i]

        # Heads that share keys together: (R, h, H / h, d).
        q = (q * layer.scaling).view(len(x), k.shape[1], -1, size)
        past = self.ungroup(self.group_by_prompt(q) @ past_k.mT + self.bias)
        scores = torch.cat([past, q @ own_k.mT], -1)  # (R, h, H / h, P + t)
        weights = scores.softmax(-1, torch.float32).to(q.dtype)
        past, own = weights.split([past_k.shape[2], own_k.shape[2]], -1)
        out = self.ungroup(self.group_by_prompt(past) @ past_v) + own @ own_v
        return layer.o_proj(out.flatten(1))

    def append(self, i, k, v):
        """Add k and v (R, h, d) to those of the completions in layer i; return all of them."""
        if self.own[i][0].shape[2] == self.length:
            self.own[i] = tuple(F.pad(t, (0, 0, 0, KV_GROWTH)) for t in self.own[i])
        for buffer, new in zip(self.own[i], (k, v)):
            buffer[:, :, self.length] = new
        return tuple(buffer[:, :, : self.length + 1] for buffer in self.own[i])
