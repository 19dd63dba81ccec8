"""Sampling with tensors of fixed size: equal to Policy.plain_decode in model.py.

Compared in tests/test_decode.py. A prompt's keys and values are held once for its group of G rows,
and every row has room for T tokens of its own. Two prompts, G = 3, T = 4, after two tokens:

  past (B, h, P, d)     own (R, h, T, d)      place in the grid of prompts and groups
  a  [ p p p p ]        a1 [ t t . . ]        a1 0      The queries of a group meet the keys of
  b  [ . p p p ]        a2 [ t t . . ]        a2 1      their prompt in one product,
                        a3 [ t t . . ]        a3 2      (B, h, G g, d) @ (B, h, d, P).
  . is masked           b1 [ t t . . ]        b1 3
                        b2 [ t t . . ]        b2 4      When a2, b1 and b3 have ended, a1, a3 and
                        b3 [ t t . . ]        b3 5      b2 move to the front: place = 0, 2, 4.

On a GPU, launching the thousand small operations of a step takes longer than computing them. No
shape changes from token to token, so a step is captured as a CUDA graph once and then replayed.
Graphs and buffers serve all later batches that fit into them.

Numbers are rounded where autocast rounds them in scoring: products have operands in half precision;
norms, rotations and the residual stream stay in float32.

Shapes: B prompts of P tokens, R = B * G rows of which n go on, H hidden width, h heads of keys and
values, g query heads for each of them, d their width.
"""

import copy
import weakref

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

# With graphs: a step reads at least so many of a row's own tokens, and so many tokens lie between
# two looks at the rows that have ended.
MIN_ROOM = 32
CHECK_EVERY = 16


def shared_decode(policy, prefill, uniform, temperature):
    """Tokens and log-probabilities (R, T), as Policy.plain_decode gives them."""
    batch = policy, prefill, uniform, temperature
    decoder = policy.decoder
    if decoder is None or not decoder.fits(*batch):
        # Free the old buffers first.
        policy.decoder = None
        decoder = SharedDecoder(*batch)
        policy.decoder = decoder

    rows, length = uniform.shape
    # A look at the rows waits for the GPU, so there it is rare.
    every = CHECK_EVERY if decoder.uses_graphs else 1
    with torch.autocast(uniform.device.type, enabled=False):
        decoder.begin(prefill, uniform)
        for t in range(1, length):
            if t % every == 0 and not decoder.drop_ended_rows():
                break
            decoder.advance(t)
    tokens = decoder.tokens[:rows, :length]
    logprobs = decoder.logprobs[:rows, :length]
    return tokens.clone(), logprobs.clone()


class SharedDecoder:
    """The buffers of R rows of up to T tokens, and the step that adds a token to each row."""

    def __init__(self, policy, prefill, uniform, temperature):
        # The policy keeps the decoder, and must not be kept by it in turn: it would not be freed.
        self.policy = weakref.proxy(policy)
        self.text = policy.base.language_model
        self.stop_ids = policy.stop_ids
        self.temperature = temperature
        self.dtype = policy.dtype
        # Sharded weights lie elsewhere each time, so a graph would not find them.
        on_gpu = policy.device.type == "cuda"
        self.uses_graphs = on_gpu and not policy.sharded
        self.graphs = {}  # by the number of rows and of visible tokens

        # Sharded weights have this type already while they are gathered.
        self.layers = self.text.layers
        is_half = self.dtype != torch.float32
        self.copied = is_half and not policy.sharded
        if self.copied:
            copies = [half_copy(layer, self.dtype) for layer in self.layers]
            self.layers = nn.ModuleList(copies)
            self.head = policy.head.to(self.dtype, copy=True)

        # Keys and values of each layer.
        self.prompts, length = prefill.mask.shape
        rows, self.room = uniform.shape
        self.group_size = rows // self.prompts
        keys = prefill.cache.layers[0].keys
        _, heads, _, width = keys.shape
        past = 2, self.prompts, heads, length, width
        own = 2, rows, heads, self.room, width
        like_keys = {"dtype": self.dtype, "device": keys.device}
        self.past = [torch.zeros(past, **like_keys) for _ in self.layers]
        self.all_own = [torch.zeros(own, **like_keys) for _ in self.layers]
        # Added to the scores of (B, h, G g, P): 0 for real tokens, -inf for padding.
        self.past_mask = torch.zeros(self.prompts, 1, 1, length, device=keys.device)

        # What goes in and comes out, (R, T).
        self.uniform = torch.zeros_like(uniform)
        self.tokens = torch.zeros_like(uniform, dtype=torch.long)
        self.logprobs = torch.zeros_like(uniform, dtype=torch.float)
        # Five numbers of each row, see `keep`, and the index of the newest tokens.
        self.state = self.tokens.new_zeros(5, rows)
        self.t = self.tokens.new_zeros(1)

    def __deepcopy__(self, memo):
        """A copy of a policy has no decoder: its graphs would read the weights of the original."""

    def fits(self, policy, prefill, uniform, temperature) -> bool:
        """Can this batch use these buffers and graphs?"""
        prompts, length = prefill.mask.shape
        rows, room = uniform.shape
        if temperature != self.temperature:
            return False
        if policy.stop_ids is not self.stop_ids:
            return False
        if rows != prompts * self.group_size:
            return False
        if prompts > self.prompts:
            return False
        if room > self.room:
            return False
        return length <= self.past_mask.shape[-1]

    def keep(self, count: int):
        """Use the first `count` rows of the buffers."""
        self.count = count
        self.own = [own[:, :count] for own in self.all_own]
        row, place, start, token, ended = self.state[:, :count]
        self.row = row  # which completion it is
        self.place = place  # in the grid of prompts and groups
        self.start = start  # the position that follows its prompt
        self.token = token  # the newest
        self.ended = ended

    def begin(self, prefill, uniform):
        """Take over the prompts of a batch and sample the first token of each row."""
        self.refresh_weights()
        prompts, length = prefill.mask.shape
        layers = prefill.cache.layers
        for past, layer in zip(self.past, layers):
            keys, values = past[:, :prompts, :, -length:]
            keys.copy_(layer.keys)
            values.copy_(layer.values)
        self.past_mask.fill_(-torch.inf)
        real = prefill.mask.bool()
        # Prompts stand at the right end of the room for the longest.
        past_mask = self.past_mask[:prompts, 0, 0, -length:]
        past_mask.masked_fill_(real, 0)

        rows, room = uniform.shape
        self.uniform[:rows, :room] = uniform
        self.t.zero_()
        self.visible = 0
        self.state.zero_()
        self.keep(rows)
        torch.arange(rows, out=self.row)
        self.place.copy_(self.row)
        start = prefill.start.repeat_interleave(self.group_size)
        self.start.copy_(start)
        # The end of a prompt predicts the first token of each of its rows.
        hidden = prefill.hidden.repeat_interleave(self.group_size, 0)
        self.sample_next(hidden)

    def refresh_weights(self):
        """Weights may have been trained since the last batch."""
        weight = self.policy.head
        if not self.copied:
            self.head = weight
            return
        self.head.copy_(weight)
        trained = self.text.layers.parameters()
        for half, weight in zip(self.layers.parameters(), trained):
            # A frozen weight may be shared.
            if half is not weight:
                half.copy_(weight)

    def advance(self, t: int):
        """Sample token t of each row."""
        if not self.uses_graphs:
            self.visible = t
            self.step()
            return
        # Rows read the first 32, 64, 128 .. tokens of their room: a graph for each of these.
        power = 1 << (t - 1).bit_length()
        power = max(MIN_ROOM, power)
        self.visible = min(self.room, power)
        key = self.count, self.visible
        if key not in self.graphs:
            self.graphs[key] = self.capture()
        self.graphs[key].replay()

    def capture(self) -> torch.cuda.CUDAGraph:
        """Record a step. Another runs before it, so that libraries are loaded, and is undone."""
        state = self.state.clone()
        t = self.t.clone()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.step()
        torch.cuda.current_stream().wait_stream(stream)
        self.state.copy_(state)
        self.t.copy_(t)

        # All graphs use one piece of memory, because nothing inside outlives a replay.
        pool = None
        if self.graphs:
            first, *_ = self.graphs.values()
            pool = first.pool()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            self.step()
        return graph

    def step(self):
        """Run the newest tokens through the layers, then sample the next ones."""
        rotation = self.rotation()
        own_mask = self.own_mask()
        x = self.text.embed_tokens(self.token)  # (n, H)
        for layer, past, own in zip(self.layers, self.past, self.own):
            # Attention, which also fills the places of the newest tokens.
            normed = rms_norm(layer.input_layernorm, x)
            normed = normed.to(self.dtype)
            q, k, v = project(layer.self_attn, normed, rotation)
            q = q.to(self.dtype)
            k = k.to(self.dtype)
            keys, values = own
            keys.index_copy_(2, self.t, k[:, :, None])
            values.index_copy_(2, self.t, v[:, :, None])
            out = self.attend(q, past, own, own_mask)
            x = x + layer.self_attn.o_proj(out)
            # MLP.
            normed = rms_norm(layer.post_attention_layernorm, x)
            normed = normed.to(self.dtype)
            x = x + layer.mlp(normed)
        self.t += 1
        hidden = rms_norm(self.text.norm, x)
        self.sample_next(hidden)

    def rotation(self):
        """Cosines and signed sines (n, 1, d) of the newest tokens' positions.

        Text has the same position on all axes of M-RoPE.
        """
        rotary = self.text.rotary_emb
        positions = self.start + self.t
        positions = positions[:, None, None]
        angles = positions * rotary.inv_freq  # (n, 1, d / 2)
        cos = angles.cos() * rotary.attention_scaling
        sin = angles.sin() * rotary.attention_scaling
        cos = torch.cat([cos, cos], -1)
        # Signed, so that `rotate` takes one multiplication for both halves.
        sin = torch.cat([-sin, sin], -1)
        return cos, sin

    def own_mask(self):
        """0 for tokens up to the newest, -inf for places that are not filled yet."""
        device = self.t.device
        places = torch.arange(self.visible, device=device)
        mask = torch.zeros_like(places, dtype=torch.float)
        is_later = places > self.t
        return mask.masked_fill(is_later, -torch.inf)

    def sample_next(self, hidden):
        """Sample token t of each row from its hidden state, (n, H)."""
        uniform = self.uniform[self.row, self.t]
        token, logp = self.policy.next_token(hidden, self.head, uniform, self.temperature)
        self.tokens[self.row, self.t] = token
        self.logprobs[self.row, self.t] = logp
        self.token.copy_(token)
        stopped = token[:, None] == self.stop_ids
        self.ended |= stopped.any(1)

    def attend(self, q, past, own, own_mask):
        """Attention of q (n, h, g, d) to the prompts and to the rows' own tokens: (n, h g d)."""
        past_k, past_v = past
        own_k, own_v = own[..., : self.visible, :]
        # A prompt's keys serve all queries of its group at once.
        to_past = self.groups(q) @ past_k.mT + self.past_mask
        to_past = self.rows(to_past)  # (n, h, g, P)
        to_own = q @ own_k.mT + own_mask  # (n, h, g, visible)
        # One softmax over both.
        scores = torch.cat([to_past, to_own], -1)
        weights = scores.softmax(-1, torch.float32)
        weights = weights.to(self.dtype)
        sizes = [to_past.shape[-1], self.visible]
        to_past, to_own = weights.split(sizes, -1)
        from_past = self.groups(to_past) @ past_v
        from_own = to_own @ own_v
        out = self.rows(from_past) + from_own
        return out.flatten(1)

    def groups(self, rows):
        """(n, h, g, d) -> (B, h, G g, d): rows of each prompt together, ended ones zero."""
        cells = self.prompts * self.group_size
        if self.count < cells:
            _, *shape = rows.shape
            empty = rows.new_zeros(cells, *shape)
            rows = empty.index_copy(0, self.place, rows)
        groups = rows.unflatten(0, (self.prompts, -1))
        groups = groups.transpose(1, 2)
        return groups.flatten(2, 3)

    def rows(self, groups):
        """The way back: (B, h, G g, d) -> (n, h, g, d)."""
        groups = groups.unflatten(2, (self.group_size, -1))
        groups = groups.transpose(1, 2)
        rows = groups.flatten(0, 1)
        if self.count < len(rows):
            rows = rows.index_select(0, self.place)
        return rows

    def drop_ended_rows(self) -> bool:
        """Once half of the rows have ended, move the others to the front. False if none is left."""
        # This waits for the GPU, so it is rare there.
        left = self.count - int(self.ended.sum())
        # Half, and not only as many as are left: there is a graph for each number of rows.
        kept = self.count // 2
        if left > kept:
            return True
        # Those that go on come first, in their order.
        rows = self.ended.argsort(stable=True)
        rows = rows[:kept]
        self.state[:, :kept] = self.state[:, rows]
        for own in self.own:
            filled = own[..., : self.visible, :]
            filled[:, :kept] = filled[:, rows]
        self.keep(kept)
        return left > 0


def half_copy(layer: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy whose linear layers are held in `dtype`. Weights that have it already are shared."""
    shared = {}
    for p in layer.parameters():
        if p.dtype == dtype:
            # deepcopy takes what it finds here.
            shared[id(p)] = p
    half = copy.deepcopy(layer, shared)
    for module in half.modules():
        if isinstance(module, nn.Linear):
            module.to(dtype)
    return half


def rms_norm(norm, x):
    """A normalisation layer of a Qwen-VL model, in one call and in float32."""
    x = x.float()
    weight = norm.weight.float()
    return F.rms_norm(x, weight.shape, weight, norm.variance_epsilon)


def project(layer, x, rotation):
    """x (n, H) -> q (n, h, g, d), k (n, h, d), v (n, h, d) of an attention layer."""
    heads = -1, layer.head_dim
    q = layer.q_proj(x)
    k = layer.k_proj(x)
    v = layer.v_proj(x)
    q = q.unflatten(1, heads)
    k = k.unflatten(1, heads)
    v = v.unflatten(1, heads)
    if hasattr(layer, "q_norm"):  # Qwen3
        q = rms_norm(layer.q_norm, q)
        k = rms_norm(layer.k_norm, k)
    q = rotate(q, *rotation)
    q = q * layer.scaling
    k = rotate(k, *rotation)
    # Queries that share a head of keys stand together.
    q = q.unflatten(1, (k.shape[1], -1))
    return q, k, v


def rotate(x, cos, sin):
    """Rotate the pairs (x_i, x_{i + d / 2}) by their angles (Su et al. 2021). sin is signed."""
    half = x.shape[-1] // 2
    partner = x.roll(half, -1)
    return torch.addcmul(x * cos, partner, sin)
