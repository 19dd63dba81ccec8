"""The policy: a vision-language model that encodes prompts, samples completions and scores them.

  Prompt, Rollout        the inputs of one prompt; G completions of it, from sampling to update
  Policy
    .encode              an example -> Prompt, for every stage
    .sample              one prefill per prompt, then all completions are decoded together
    .logprobs            log-probabilities of given completions, with gradients
    .freeze, .add_lora   what is trained
    .save                a Hugging Face folder
  sample_tokens          one token for each row of logits
  fused_logprobs         log-probabilities without the [tokens, vocabulary] logits
  load_policy            a local folder, a hub id, or the built-in tiny Qwen3-VL
  load_frozen            a checkpoint, to be evaluated
  save_checkpoint, resume

Sampling and scoring stand here in their plain form, Policy.plain_decode and plain_hidden. With
model.shared_prefix, fast/ replaces these two by equal ones that run every prompt once.

Shapes: B prompts, G completions of each, R = B * G rows, P prompt tokens, T completion tokens,
H hidden width, V vocabulary.
"""

import copy
import functools
import hashlib
import itertools
import json
import os
import re
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.nn.utils.rnn import pad_sequence
from torch.utils._pytree import tree_map_only
from tqdm import tqdm
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
from transformers.modeling_layers import GradientCheckpointingLayer

# Older versions of transformers have it only here.
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
from transformers.utils import is_torchvision_available

import data
from data import Example
from runtime.checkpoint import last_step, write_checkpoint
from runtime.config import Config, InputError
from runtime.optimizer import Optimizer
from runtime.output import moved, print0, rank, world_size
from runtime.processes import gather_objects, shard_weights, unsharded, whole_tensor

# ------------------------------------------------------------------------------- data types

# The inputs with one value for each token. All others belong to the images.
TOKEN_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")


@dataclass
class Prompt:
    """The model inputs of one prompt."""

    tokens: dict[str, Tensor]  # (1, P) each, see TOKEN_INPUTS
    positions: Tensor  # (1, P); with M-RoPE (3, 1, P)
    next_position: int
    images: dict[str, Tensor]  # pixels and their sizes; the first dimension counts images or parts
    # What a frozen vision tower makes of the images, once it is known: see fast/frozen_tower.py.
    features: Sequence[Tensor] | None = None

    @property
    def input_ids(self) -> Tensor:
        return self.tokens["input_ids"]

    def __len__(self) -> int:
        return self.input_ids.shape[1]

    def to(self, device: torch.device) -> "Prompt":
        def move(tensor):
            return tensor.to(device)

        return Prompt(**tree_map_only(Tensor, move, vars(self)))


@dataclass
class Rollout:
    """G completions of one prompt, which is held once."""

    example: Example
    prompt: Prompt | None
    tokens: list[Tensor]  # G tensors (T_g,), with the end-of-turn token
    texts: list[str] = field(default_factory=list)
    # Ended by themselves, and not at max_new_tokens.
    finished: list[bool] = field(default_factory=list)
    # "sampled", "old" and "reference" -> G tensors (T_g,), under the policy that sampled, the
    # policy before the first update, and the frozen reference.
    logprobs: dict[str, list[Tensor]] = field(default_factory=dict)
    rewards: list[float] = field(default_factory=list)  # G, from scoring
    reward_components: dict[str, list[float]] = field(default_factory=dict)
    advantages: Tensor | None = None  # (G,)

    @property
    def lengths(self) -> list[int]:
        return [len(ids) for ids in self.tokens]

    @property
    def is_degenerate(self) -> bool:
        """All advantages are zero, so the group has no policy gradient (it has one of the KL)."""
        return not self.advantages.any()


@dataclass
class Prefill:
    """B prompts after their forward pass, ready for decoding."""

    cache: Any  # keys and values (B, h, P, d) of each layer
    mask: Tensor  # (B, P)
    start: Tensor  # (B,) the position that follows each prompt
    hidden: Tensor  # (B, H) of the last tokens, which predict the first tokens


def pad_rows(rows: list[Tensor]) -> Tensor:
    """R tensors (T_r,) -> (R, T), with zeros at the end."""
    return pad_sequence(rows, batch_first=True)


def pad_images(tensors: list[Tensor]) -> Tensor:
    """Concatenate along the first dimension. The others, such as the crops of an image or its
    height, are padded with zeros at the end."""
    sizes = zip(*(t.shape[1:] for t in tensors))
    largest = [max(size) for size in sizes]
    counts = [len(t) for t in tensors]
    out = tensors[0].new_zeros(sum(counts), *largest)
    for part, t in zip(out.split(counts), tensors):
        corner = tuple(slice(size) for size in t.shape)
        part[corner] = t
    return out


# ------------------------------------------------------------------------------- the policy

# The model types whose layers fast/ knows.
SHARING = ("qwen3_vl", "qwen2_5_vl", "qwen2_vl")
PROJECTORS = (
    "visual.merger",
    "visual.deepstack_merger_list",
    "multi_modal_projector",
    "connector",
    "image_newline",
)
TOWERS = ("visual", "vision_tower", "vision_model")


def chat_turn(role, text):
    """A turn of a conversation, as chat templates take it."""
    return {"role": role, "content": [{"type": "text", "text": text}]}


def part_of(name: str) -> str | None:
    """The part that a parameter belongs to: "vision", "projector" or None (the language model)."""
    name = name.removeprefix("model.")
    if name.startswith(PROJECTORS):
        return "projector"
    return "vision" if name.startswith(TOWERS) else None


def in_fsdp_forward(method):
    """A method of Policy that runs inside the forward of its model.

    FSDP2 gathers the root's weights only there. run_in_forward, which shard_weights in
    runtime/processes.py gives the model, calls what it is given. Within `unsharded` nothing is
    left to gather.
    """

    @functools.wraps(method)
    def wrapped(self, *args, **kwargs):
        if not self.sharded:
            return method(self, *args, **kwargs)
        return self.model.run_in_forward(lambda: method(self, *args, **kwargs))

    return wrapped


class Policy:
    """A Hugging Face vision-language model with its processor."""

    def __init__(self, model: nn.Module, processor: Any, config: Config, path: str = ""):
        self.config = config
        self.path = path
        self.start = ""  # the checkpoint that training began at
        # In float32: the small steps of training would be lost in half precision.
        self.model = model.float().eval().requires_grad_(True)
        self.base = model.model  # without the language-model head
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self.device = torch.device("cpu")
        if torch.cuda.is_available():
            local_rank = os.environ.get("LOCAL_RANK", 0)
            self.device = torch.device(f"cuda:{local_rank}")
        if not self.head.is_meta:
            self.model.to(self.device)
        self.sharded = False
        self.vision_frozen = False
        self.adapted: dict[str, LoRALinear] = {}  # by the name of the layer
        self.dummy_prompt: Prompt | None = None  # for with_dummy_steps
        self.n_skipped = 0  # examples that could not be used when they came up, by this process
        self.decoder: Any = None  # of fast/, which keeps its buffers
        self.ahead: Any = None  # of fast/, see encode_ahead

        self.shared = config.model.shared_prefix and self.can_share()
        if config.model.gradient_checkpointing:
            self.enable_checkpointing()
        if config.model.compile:
            self.compile_layers()

        # A completion ends with the end of a turn, or with what the model counts as an end.
        self.end_id = self.end_of_turn()
        eos = model.generation_config.eos_token_id
        stop_ids = {self.end_id, self.tokenizer.eos_token_id}
        stop_ids.update([eos] if isinstance(eos, int) else eos or [])
        self.stop_ids = torch.tensor(sorted(stop_ids), device=self.device)
        # What it may not contain.
        self.banned_ids = self.vision_ids()
        self.banned = torch.tensor(self.banned_ids, device=self.device)

    @property
    def head(self) -> Tensor:
        """Weight (V, H) of the language-model head, often that of the embedding."""
        return self.model.get_output_embeddings().weight

    def parameters(self) -> list[nn.Parameter]:
        """Those that are trained."""
        return [p for p in self.model.parameters() if p.requires_grad]

    @property
    def dtype(self) -> torch.dtype:
        """Of the operands of matrix products."""
        return getattr(torch, self.config.model.precision)

    def blocks(self) -> dict[str, nn.Module]:
        """The layers of the language model and of the vision tower, by their names."""
        named = self.model.named_modules()
        return {name: m for name, m in named if isinstance(m, GradientCheckpointingLayer)}

    def autocast(self) -> Any:
        if self.dtype != torch.float32:
            return torch.autocast(self.device.type, self.dtype)
        return nullcontext()

    # -- inputs: every stage builds its inputs here

    def chat(self, example: Example) -> str:
        """The text up to where the assistant's answer begins, with one placeholder per image."""
        texts = list(itertools.chain.from_iterable(example.history))
        texts.append(data.prompt_text(example))
        roles = itertools.cycle(["user", "assistant"])
        turns = [chat_turn(role, text) for role, text in zip(roles, texts)]
        # A later question shows as many images as its text has placeholders. The others stand
        # before the first question.
        early = len(example.images)
        for turn in turns[2::2]:
            (part,) = turn["content"]
            images = [{"type": "image"}] * part["text"].count(data.IMAGE)
            part["text"] = part["text"].replace(data.IMAGE, "").strip()
            turn["content"] = images + turn["content"]
            early -= len(images)
        images = [{"type": "image"}] * early
        turns[0]["content"] = images + turns[0]["content"]
        return self.processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)

    def encode(self, example: Example) -> Prompt:
        """The model inputs of an example's prompt. Raises InputError."""
        # A worker may have it ready.
        encode = self.ahead or self.encode_here
        return encode(example).to(self.device)

    def encode_ahead(self, upcoming: Iterable[Example]):
        """Let data.workers processes encode these examples, in the order in which `encode` will be
        asked for them. Any other example is encoded when it is asked for."""
        if self.config.data.workers:
            from fast.encode_ahead import encode_ahead  # noqa: PLC0415

            # Weak, so that the model is freed when nothing else keeps it.
            self.ahead = encode_ahead(weakref.proxy(self), upcoming)

    def encode_here(self, example: Example) -> Prompt:
        """The same on the CPU, in this process."""
        images = data.open_images(example)
        text = self.chat(example)
        # Some chat templates write the beginning of the text, some leave it to the tokenizer.
        begin = self.tokenizer.bos_token
        has_begin = bool(begin) and text.startswith(begin)
        try:
            inputs = self.processor(
                text=[text], images=[images], return_tensors="pt", add_special_tokens=not has_begin
            )
        except ValueError as error:
            sizes = ", ".join(f"{i.width}x{i.height}" for i in images)
            raise InputError(
                f"{example.id}: the processor refuses its images ({sizes}): {error}"
            ) from None
        # While the inputs are on the CPU: from a GPU, each number would have to be waited for.
        positions = self.positions(inputs)
        next_position = int(positions.max()) + 1
        tokens = {name: inputs.pop(name) for name in TOKEN_INPUTS if name in inputs}
        prompt = Prompt(tokens, positions, next_position, dict(inputs))
        limit = self.config.model.max_prompt_tokens
        if len(prompt) > limit:
            raise InputError(
                f"{example.id}: the prompt with its images takes {len(prompt)} tokens, more than "
                f"model.max_prompt_tokens={limit}; raise it or lower model.max_pixels"
            )
        return prompt

    def positions(self, inputs: dict[str, Tensor]) -> Tensor:
        """Positions (1, P) of a prompt's tokens; with M-RoPE, time, height and width, (3, 1, P).

        Passed explicitly everywhere: left to itself, an M-RoPE model reuses offsets of an earlier
        call.
        """
        if not hasattr(self.base, "get_rope_index"):
            return inputs["attention_mask"].cumsum(-1) - 1
        # Families take different ones of these.
        names = ("input_ids", "mm_token_type_ids", "image_grid_thw", "attention_mask")
        known = {name: inputs[name] for name in names if name in inputs}
        positions, _ = self.base.get_rope_index(**known)
        return positions

    def split_at_images(self, prompt):
        """The prompt up to its last image token, which all questions on an image share, and the ids
        (Q,) after it."""
        ids = prompt.input_ids[0]
        end = self.end_of_images(ids)
        tokens = {}
        for name, values in prompt.tokens.items():
            tokens[name] = values[:, :end]
        positions = prompt.positions[..., :end]
        next_position = int(positions.max()) + 1
        shared = Prompt(tokens, positions, next_position, prompt.images)
        return shared, ids[end:]

    def question_ids(self, example: Example) -> Tensor:
        """(Q,) ids of the prompt after its last image token. The images are not opened."""
        chat = self.chat(example)
        token = self.processor.image_token
        if chat.count(token) > len(example.images):
            raise InputError(
                f"{example.id}: its question contains {token}, which stands for an image; remove it"
            )
        # What the processor would write after the last image.
        text = self.image_end + chat.rpartition(token)[2]
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return torch.tensor(ids, device=self.device)

    @cached_property
    def image_end(self) -> str:
        """What the processor writes after an image, such as Gemma's <end_of_image>."""
        # After any image it is the same.
        image = Image.new("RGB", (64, 64))
        token = self.processor.image_token
        inputs = self.processor(
            text=[token], images=[[image]], return_tensors="pt", add_special_tokens=False
        )
        ids = inputs["input_ids"][0]
        return self.tokenizer.decode(ids[self.end_of_images(ids) :])

    def end_of_images(self, ids):
        """The place after the last image token of ids (P,)."""
        places = (ids == self.model.config.image_token_id).nonzero()
        return int(places[-1]) + 1

    def encode_target(self, example: Example) -> Tensor:
        """(T,) ids of the supervised answer, with the end-of-turn token."""
        text = data.target_text(example)
        if self.opens_think:
            text = data.after_opened_think(text)
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        # The model learns to end its turn, too.
        ids.append(self.end_id)
        ids = torch.tensor(ids, device=self.device)
        banned = ids[torch.isin(ids, self.banned)]
        if len(banned):
            raise InputError(
                f"{example.id}: its answer contains {self.tokenizer.decode(banned[:1])}, which "
                f"stands for an image; remove it"
            )
        return ids

    def encode_all(
        self, examples: Sequence[Example], encode: Callable[[Example], Any] | None = None
    ) -> list[tuple[Example, Any]]:
        """Each usable example with its prompt, or with what `encode` gives.

        data.on_error=skip leaves the others out and counts them; else the first raises InputError.
        """
        encode = encode or self.encode
        pairs = []
        for example in examples:
            try:
                pairs.append((example, encode(example)))
            except InputError as error:
                if self.config.data.on_error == "stop":
                    raise
                self.n_skipped += 1
                tqdm.write(f"skipped, {self.n_skipped} so far: {error}", file=sys.stderr)
        return pairs

    def pad_prompts(self, prompts):
        """The token inputs of B prompts, (B, P), and their positions. Padding stands at the left.

        It is not attended to, so what stands there does not matter.
        """
        length = max(map(len, prompts))

        def join(tensors):
            padded = []
            for t in tensors:
                missing = length - t.shape[-1]
                padded.append(F.pad(t, (missing, 0)))
            # With M-RoPE, an axis comes before that of the prompts.
            return torch.cat(padded, -2)

        tokens = {"position_ids": join([p.positions for p in prompts])}
        for name in prompts[0].tokens:
            tokens[name] = join([p.tokens[name] for p in prompts])
        return tokens

    def run(self, prompts, tokens, **options):
        """The model without its head, on token inputs and the images of these prompts."""
        images = {}
        for name in prompts[0].images:
            parts = [p.images[name] for p in prompts]
            images[name] = pad_images(parts)
        tower = nullcontext()
        if all(p.features is not None for p in prompts):
            from fast.frozen_tower import known_features  # noqa: PLC0415

            tower = known_features(self.base.visual, prompts)
        with tower:
            return self.base(**tokens, **images, **options)

    def remember_images(self, prompts):
        """Run a frozen vision tower once: sampling, reference (which starts from the same tower)
        and update share its output."""
        if self.shared and self.vision_frozen:
            from fast.frozen_tower import remember_features  # noqa: PLC0415

            with torch.no_grad(), self.autocast():
                remember_features(self, prompts)

    # -- sampling

    @torch.no_grad()
    def sample(
        self,
        examples: Sequence[Example],
        group_size: int,
        max_new_tokens: int,
        temperature: float,
        stream: tuple[int, ...] = (0,),
    ) -> list[Rollout]:
        """G completions of every example's prompt from the full softmax (never top-k or top-p).

        Temperature 0 is greedy. Each (stream, example, completion) has its own random numbers, so
        samples do not depend on the order or on the number of processes. Returns one Rollout per
        usable example.
        """
        # In train mode, checkpointing would leave out the cache.
        self.model.eval()
        pairs = self.encode_all(examples)
        if not pairs:
            return []
        # The numbers are a function of stream, id and completion.
        uniform = []
        for example, _ in pairs:
            digest = hashlib.sha1(example.id.encode()).hexdigest()
            key = int(digest[:12], 16)
            for g in range(group_size):
                generator = np.random.default_rng([*stream, key, g])
                uniform.append(generator.random(max_new_tokens))
        uniform = torch.from_numpy(np.stack(uniform))  # (R, max_new_tokens)
        uniform = uniform.to(self.device)

        prompts = [prompt for _, prompt in pairs]
        # Compiled layers would be compiled again for each cache that they fill.
        with torch.compiler.set_stance("force_eager"), self.autocast():
            tokens, logprobs, finished = self.decode_groups(prompts, uniform, temperature)

        # Rows i G to (i + 1) G belong to prompt i.
        rollouts = []
        for i, (example, prompt) in enumerate(pairs):
            group = slice(i * group_size, (i + 1) * group_size)
            texts = [self.decode(ids) for ids in tokens[group]]
            sampled = {"sampled": logprobs[group]}
            rollout = Rollout(example, prompt, tokens[group], texts, finished[group], sampled)
            rollouts.append(rollout)
        return rollouts

    @in_fsdp_forward
    def decode_groups(self, prompts, uniform, temperature):
        """One prefill per prompt, then the R rows together, a token at a time.

        uniform (R, T) are the random numbers. Returns for each row its tokens and their
        log-probabilities (T_r,), and whether it ended by itself.
        """
        decode = self.plain_decode
        if self.shared:
            from fast.shared_decode import shared_decode  # noqa: PLC0415

            decode = functools.partial(shared_decode, self)
        tokens, logprobs = decode(self.prefill(prompts), uniform, temperature)  # (R, T)

        # A row ends with its first stop token.
        stops = torch.isin(tokens, self.stop_ids)
        finished = stops.any(1)
        first_stop = stops.int().argmax(1)
        lengths = torch.where(finished, first_stop + 1, tokens.shape[1])
        if not logprobs.isfinite().all():
            raise InputError(
                "the model's logits are not finite: its weights have overflowed. Go back to an "
                "earlier checkpoint and lower lr, or try model.precision=float32"
            )
        # Here the GPU is waited for, once for all rows.
        sizes = lengths.tolist()
        tokens = [row[:size] for row, size in zip(tokens, sizes)]
        logprobs = [row[:size] for row, size in zip(logprobs, sizes)]
        return tokens, logprobs, finished.tolist()

    def prefill(self, prompts):
        """Run B prompts once."""
        self.remember_images(prompts)
        tokens = self.pad_prompts(prompts)
        out = self.run(prompts, tokens, use_cache=True)
        start = [p.next_position for p in prompts]
        start = torch.tensor(start, device=self.device)
        hidden = out.last_hidden_state[:, -1]
        return Prefill(out.past_key_values, tokens["attention_mask"], start, hidden)

    def plain_decode(self, prefill, uniform, temperature):
        """Sample R rows by the model's own forward, each with its own copy of its prompt.

        uniform (R, T). Returns tokens and log-probabilities (R, T), or fewer if all rows end early.
        What follows a row's first stop token means nothing.
        """
        group_size = len(uniform) // len(prefill.mask)
        prefill.cache.batch_repeat_interleave(group_size)
        mask = prefill.mask.repeat_interleave(group_size, 0)
        start = prefill.start.repeat_interleave(group_size)
        hidden = prefill.hidden.repeat_interleave(group_size, 0)  # (R, H)
        # Cast once, and not for each token.
        weight = self.head.to(self.dtype)
        tokens = []
        logprobs = []
        ended = torch.zeros_like(start, dtype=torch.bool)
        for t in range(uniform.shape[1]):
            token, logp = self.next_token(hidden, weight, uniform[:, t], temperature)
            tokens.append(token)
            logprobs.append(logp)
            ended |= torch.isin(token, self.stop_ids)
            if ended.all():
                break
            # The new tokens go through the model, which adds their keys and values to the cache.
            mask = F.pad(mask, (0, 1), value=1)
            positions = self.later_positions(start + t, 1)
            out = self.base(
                input_ids=token[:, None],
                attention_mask=mask,
                position_ids=positions,
                past_key_values=prefill.cache,
                use_cache=True,
            )
            hidden = out.last_hidden_state[:, 0]
        return torch.stack(tokens, 1), torch.stack(logprobs, 1)

    def later_positions(self, start, length):
        """Positions (R, T) of text that begins at start (R,); with M-RoPE (3, R, T)."""
        places = torch.arange(length, device=start.device)
        positions = start[:, None] + places
        if hasattr(self.base, "get_rope_index"):
            # Text has one position on all axes.
            return positions.expand(3, -1, -1)
        return positions

    def next_token(self, hidden, weight, uniform, temperature):
        """Sample from hidden states (R, H) by uniform (R,): tokens and log-probabilities (R,).

        weight (V, H): of the head, in the type that products take. Temperature 0 is greedy.
        """
        with torch.autocast(hidden.device.type, enabled=False):
            hidden = hidden.to(weight.dtype)
            logits = head_logits(hidden, weight, temperature or 1)
        logits[:, self.banned] = BANNED_LOGIT
        return sample_tokens(logits, uniform if temperature else None)

    def decode(self, ids: Tensor) -> str:
        """The text without the end-of-turn token. Other special tokens stay visible to rewards, and
        so does a <think> that the chat template has opened."""
        is_stop = torch.isin(ids, self.stop_ids)
        ids = ids[~is_stop]
        text = self.tokenizer.decode(ids, skip_special_tokens=False)
        return f"<think>{text}" if self.opens_think else text

    # -- scoring

    @in_fsdp_forward
    def logprobs(
        self,
        prompts: list[Prompt],
        completions: list[list[Tensor]],
        temperature: float = 1.0,
        n_scored: list[int] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Score completions of B prompts, given as B lists of id tensors (T,), R in all.

        Returns log-probabilities, entropies, and the mask of the scored tokens, (R, T) each. Scored
        are all tokens, or the last n_scored (R numbers) of each row. Gradients flow through the
        log-probabilities only.
        """
        # Checkpointing is active in train mode only. There is no dropout in either.
        self.model.train(self.config.model.gradient_checkpointing)
        rows = list(itertools.chain.from_iterable(completions))
        owner = [b for b, group in enumerate(completions) for _ in group]
        lengths = [len(row) for row in rows]
        n_scored = n_scored or lengths
        # The last n tokens of each row.
        begins = [length - n for length, n in zip(lengths, n_scored)]
        targets = [row[begin:] for row, begin in zip(rows, begins)]
        targets = torch.cat(targets)  # (N,)
        # On the CPU, where the sizes are known: the GPU is not waited for.
        ranges = [torch.arange(length) >= begin for length, begin in zip(lengths, begins)]
        scored = pad_rows(ranges)  # (R, T)
        # Before the forward: a copy that comes after it would wait for it. Places and not the mask
        # alone: the GPU would have to be waited for to know how many they are.
        mask = scored.to(self.device, non_blocking=True)
        places = scored.flatten().nonzero()[:, 0]  # (N,)
        places = places.to(self.device, non_blocking=True)

        hidden_of = self.plain_hidden
        if self.shared:
            from fast.shared_prefix import shared_hidden  # noqa: PLC0415

            hidden_of = functools.partial(shared_hidden, self)
        with self.autocast():
            hidden = hidden_of(prompts, rows, owner, scored)  # (N, H)
        # The logits of all tokens together would not fit: fused_logprobs makes them in tiles.
        hidden = hidden.to(self.dtype)
        flat = fused_logprobs(hidden, self.head, targets, temperature, self.banned_ids)
        empty = torch.zeros(mask.numel(), device=self.device)
        logp, entropy = (empty.index_copy(0, places, values) for values in flat)
        return logp.view_as(mask), entropy.view_as(mask), mask

    def tokens_to_score(self, prompts: list[Prompt], lengths: list[list[int]]) -> int:
        """Tokens in a forward pass of logprobs. lengths: of the completions of each prompt."""
        if self.shared:
            return sum(map(len, prompts)) + sum(map(sum, lengths))
        # Every row has its own prompt, and they are padded to the longest.
        rows = sum(map(len, lengths))
        longest = max(map(len, prompts)) + max(map(max, lengths))
        return rows * longest

    def micro_batches(self, rollouts: list[Rollout], micro_tokens: int) -> list[list[Rollout]]:
        """The rollouts in order, as many together as make micro_tokens tokens; at least one."""
        batches = []
        for rollout in rollouts:
            if batches:
                larger = [*batches[-1], rollout]
                prompts = [r.prompt for r in larger]
                lengths = [r.lengths for r in larger]
                size = self.tokens_to_score(prompts, lengths)
                if size <= micro_tokens:
                    batches[-1] = larger
                    continue
            batches.append([rollout])
        return batches

    def plain_hidden(self, prompts, rows, owner, scored):
        """Hidden states (N, H) that predict the scored tokens, from R rows [prompt | completion].

        rows: R completions (T_r,), owner: the prompt of each, scored (R, T). Every row has its own
        copy of the prompt and its images.
        """
        # [padding | prompt | completion | padding]
        copies = [prompts[b] for b in owner]
        tokens = self.pad_prompts(copies)
        ids = pad_rows(rows)  # (R, T)
        start = [p.next_position for p in copies]
        start = torch.tensor(start, device=self.device)
        real = pad_rows([torch.ones_like(row) for row in rows])
        positions = self.later_positions(start, ids.shape[1])
        after = {"input_ids": ids, "attention_mask": real, "position_ids": positions}
        for name, before in tokens.items():
            # Text has 0 in every other token-shaped input.
            rest = after.get(name, torch.zeros_like(ids))
            tokens[name] = torch.cat([before, rest], -1)
        out = self.run(copies, tokens, use_cache=False)
        # A token is predicted by the one before it: the last of the prompt begins.
        first = ids.shape[1] + 1
        predictors = out.last_hidden_state[:, -first:-1]  # (R, T, H)
        return predictors[scored.to(self.device)]

    # -- sharding

    def shard(self):
        """Spread the weights over the processes, see runtime.processes.shard_weights."""
        # Blocks are gathered in the type that their products take.
        half = torch.bfloat16 if self.config.model.precision == "bfloat16" else None
        blocks = list(self.blocks().values())
        shard_weights(self.model, blocks, half)
        self.sharded = True

    def unsharded(self) -> Any:
        """A context with whole weights, for work without gradients. Collective at its ends."""
        return unsharded(self.model)

    def with_dummy_steps(self, batches: list) -> Iterator:
        """Yield the batches; then run dummy steps, which have no effect. Collective with shards.

        Sharded weights are gathered by all processes together, so a process that has no more
        batches runs a dummy step for each that another one still has.
        """
        # Replicated weights need no other process until the gradients are summed.
        most = max(gather_objects(len(batches))) if self.sharded else 0
        yield from batches
        for _ in range(most - len(batches)):
            row = self.stop_ids[:1].expand(2)
            logp, _, _ = self.logprobs([self.dummy_prompt], [[row]])
            nothing = 0 * logp.sum()
            nothing.backward()

    # -- what is trained

    def freeze(self, parts: Sequence[str]):
        """Do not train these parts: "vision", "projector". Raises InputError for a missing one.

        Frozen weights are held in model.precision. vision_frozen: neither part is trained, here or
        because adapters stand elsewhere; then the features of an image stay the same.
        """
        named = [(part_of(name), p) for name, p in self.model.named_parameters()]
        missing = set(parts) - {part for part, _ in named}
        if missing:
            raise InputError(
                f"freeze={list(parts)}: {type(self.model).__name__} has no "
                f"{' or '.join(sorted(missing))} of a known name"
            )
        for part, p in named:
            if part in parts:
                p.requires_grad_(False)
        # Are the features of images fixed? Of the tower and of what maps them.
        towers = [p for part, p in named if part == "vision"]
        seeing = [p for part, p in named if part and p.requires_grad]
        self.vision_frozen = bool(towers) and not seeing
        self.halve_frozen()

    def freeze_all(self) -> "Policy":
        """Train nothing: a reference, or a policy to evaluate."""
        self.model.requires_grad_(False)
        self.halve_frozen()
        return self

    def halve_frozen(self):
        """Hold frozen products in model.precision. Only what is trained needs float32.

        Autocast would make the same numbers anew each time. Embeddings and norms stay in float32.
        """
        if self.sharded:
            return
        embedding = self.model.get_input_embeddings().weight
        for module in self.model.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d, nn.Conv3d)):
                for p in module.parameters(recurse=False):
                    if p is not embedding and not p.requires_grad:
                        p.data = p.data.to(self.dtype)

    def add_lora(self, lora_rank: int, frozen: Sequence[str] = ()):
        """Freeze the model and give its layers model.lora_targets adapters, except in `frozen`
        parts. A is random, B is zero: nothing changes yet."""
        targets = self.config.model.lora_targets
        # The head is not run as a layer, see fused_logprobs.
        head = self.model.get_output_embeddings()
        linear = []
        for name, layer in self.model.named_modules():
            if isinstance(layer, nn.Linear) and layer is not head and part_of(name) not in frozen:
                linear.append(name)
        names = {name.rpartition(".")[2] for name in linear}
        if not targets or set(targets) - names:
            raise InputError(
                f"model.lora_targets={targets}: the linear layers of {type(self.model).__name__} "
                f"are {', '.join(sorted(names))}"
            )
        chosen = [name for name in linear if name.rpartition(".")[2] in targets]
        self.add_adapters(lora_rank, chosen)

    def add_adapters(self, lora_rank, names):
        # Only adapters learn. They begin with the same numbers on every process.
        self.model.requires_grad_(False)
        generator = torch.Generator().manual_seed(self.config.seed)
        for name in names:
            layer = self.model.get_submodule(name)
            # A class of its own, so that the weight keeps its name.
            layer.__class__ = LoRALinear
            layer.add_adapter(lora_rank, generator)
            self.adapted[name] = layer

    @contextmanager
    def without_adapters(self) -> Iterator[None]:
        """The model as it was before add_lora: the reference policy, without a second copy."""
        try:
            for layer in self.adapted.values():
                layer.on = False
            yield
        finally:
            for layer in self.adapted.values():
                layer.on = True

    def adapters(self):
        """The adapters by their names in PEFT's files."""
        adapters = {}
        for name, layer in self.adapted.items():
            prefix = f"base_model.model.{name}"
            adapters[f"{prefix}.lora_A.weight"] = layer.lora_A
            adapters[f"{prefix}.lora_B.weight"] = layer.lora_B
        return adapters

    @torch.no_grad()
    def load_adapters(self, folder: Path):
        # Their names are PEFT's, whoever has written them.
        saved = load_file(folder / "adapter_model.safetensors")
        for name, parameter in self.adapters().items():
            parameter.copy_(saved[name])

    # -- files

    def whole_weights(self):
        """State dict with adapters merged, and adapters, whole on the first process. Collective."""
        # A tied weight has two names and is saved once.
        once = dict(self.model.named_parameters())
        every = dict(self.model.named_parameters(remove_duplicate=False))
        state = self.model.state_dict()
        for name in every.keys() - once.keys():
            del state[name]
        # Each tensor is gathered by all processes, in the same order.
        state = {name: whole_tensor(tensor) for name, tensor in state.items()}
        adapters = {}
        for name, p in self.adapters().items():
            adapters[name] = whole_tensor(p.detach())
        if rank() == 0:
            self.merge(state)
        return state, adapters

    def merge(self, state):
        """Add the adapters to the weights of a whole state dict: on the CPU, where there is room
        for these in float32."""
        for name, layer in self.adapted.items():
            a = state.pop(f"{name}.lora_A").cpu()
            b = state.pop(f"{name}.lora_B").cpu()
            weight = state[f"{name}.weight"].cpu()
            state[f"{name}.weight"] = weight + layer.scale * b @ a

    def save(self, folder: Path, weights: tuple[dict, dict] | None = None):
        """Write model, tokenizer and image processor in Hugging Face format.

        Adapters are merged, and once more in the folder `adapter`, in PEFT's format. weights: from
        whole_weights.
        """
        transformers.utils.logging.disable_progress_bar()
        # Merged, so that the folder can be used without PEFT.
        state, adapters = weights or self.whole_weights()
        self.model.save_pretrained(folder, state_dict=state)
        if self.adapted:
            self.save_adapters(folder / "adapter", adapters)
        self.processor.save_pretrained(folder)

        # With torchvision, transformers looks for the video half of a processor, too.
        parts = PROCESSOR_MAPPING[type(self.model.config)].get_attributes()
        if "video_processor" in parts and not hasattr(self.processor, "video_processor"):
            images = self.processor.image_processor
            names = ("patch_size", "temporal_patch_size", "merge_size")
            sizes = {name: getattr(images, name) for name in names if hasattr(images, name)}
            Path(folder, "video_preprocessor_config.json").write_text(json.dumps(sizes))

    def save_adapters(self, folder, adapters):
        folder.mkdir()
        save_file(adapters, folder / "adapter_model.safetensors")
        first, *_ = self.adapted.values()
        lora_rank = len(first.lora_A)
        peft = {
            "peft_type": "LORA",
            "r": lora_rank,
            "lora_alpha": LoRALinear.scale * lora_rank,
            "target_modules": sorted(self.adapted),
            "base_model_name_or_path": self.path,
            "bias": "none",
        }
        (folder / "adapter_config.json").write_text(json.dumps(peft))

    # -- what __init__ finds out about the model

    def can_share(self) -> bool:
        """Turn on fast/ if it knows the model. Else say that completions run their prompts."""
        # fast/ lets a token attend to all before it.
        text = self.model.config.get_text_config()
        windows = "sliding_attention" in (getattr(text, "layer_types", None) or ())
        rope = getattr(text, "rope_parameters", None) or {}
        # Positions that turn by angles which depend on the longest row.
        by_length = rope.get("rope_type") in ("dynamic", "longrope")
        model_type = self.model.config.model_type
        if model_type not in SHARING or windows or by_length:
            print0(
                f"model.shared_prefix: {model_type} is none of {', '.join(SHARING)}, or has "
                f"windowed attention or a rotation by length: each completion runs its prompt"
            )
            return False
        import fast.patches  # noqa: PLC0415
        import fast.shared_prefix  # noqa: PLC0415

        if self.device.type == "cuda":
            fast.patches.use_products(self.model)
        self.model.set_attn_implementation({"text_config": "shared", "vision_config": "sdpa"})
        return True

    def enable_checkpointing(self):
        """Gradient checkpointing, which is active in train mode only, but without any dropout:
        old and new log-probs have to agree."""
        self.model.gradient_checkpointing_enable({"use_reentrant": False})
        for module in self.model.modules():
            for name in ("p", "dropout", "attention_dropout"):
                if isinstance(vars(module).get(name), float):
                    setattr(module, name, 0.0)

    def compile_layers(self):
        """Compile the parts of each block: norms, attention, MLP. Their code is shared by blocks.

        Not whole blocks: gradient checkpointing calls what it repeats within them.
        """
        for name, block in self.blocks().items():
            for part, module in block.named_children():
                # A tower's attention loops over images, so each number of images would be compiled.
                if not (part_of(name) == "vision" and "attn" in part):
                    module.compile(dynamic=True)

    def end_of_turn(self):
        """The token after an answer in the chat template. Gemma's is not its end of text."""
        turns = [chat_turn("user", "QUESTION"), chat_turn("assistant", "ANSWER")]
        chat = self.processor.apply_chat_template(turns, tokenize=False)
        _, _, after = chat.rpartition("ANSWER")
        after = self.tokenizer(after, add_special_tokens=False)["input_ids"]
        # The first special token that the template writes.
        added = self.tokenizer.added_tokens_decoder
        return next((i for i in after if i in added), self.tokenizer.eos_token_id)

    @cached_property
    def opens_think(self) -> bool:
        """Does the chat template begin an answer with <think>, as Qwen3-VL-Thinking's does?"""
        chat = self.processor.apply_chat_template(
            [chat_turn("user", "QUESTION")], add_generation_prompt=True, tokenize=False
        )
        return chat.rstrip().endswith("<think>")

    def vision_ids(self):
        """Tokens that stand for images: banned in sampling and in scoring alike.

        A completion with one could not be scored, as no image belongs to it.
        """
        pattern = re.compile(r"image|img|vision|video|^<row_\d", re.IGNORECASE)
        added = self.tokenizer.added_tokens_decoder
        ids = {self.model.config.image_token_id}
        for i, token in added.items():
            if pattern.search(token.content):
                ids.add(i)
        return sorted(i for i in ids if i < len(self.head))


class LoRALinear(nn.Linear):
    """y = W x + (alpha / r) B A x with a frozen W (Hu et al. 2021, equation 3); alpha = 2 r."""

    scale, on = 2.0, True

    def add_adapter(self, lora_rank, generator):
        a = torch.rand(lora_rank, self.in_features, generator=generator)
        a = a.mul_(2).sub_(1) / self.in_features**0.5
        # B is zero, so that training begins at the model as it was.
        self.lora_A = nn.Parameter(a.to(self.weight.device))
        b = self.weight.new_zeros(self.out_features, lora_rank)
        self.lora_B = nn.Parameter(b)

    def forward(self, x):
        y = super().forward(x)
        if not self.on:
            return y
        low_rank = F.linear(x, self.lora_A)
        return y + self.scale * F.linear(low_rank, self.lora_B)


# ------------------------------------------------------------------------------- head and sampling

# Logits in a tile, in float32: 16 MiB on a CPU, 1 GiB on a GPU.
TILE_SIZE = {"cpu": 1 << 22, "cuda": 1 << 28}
# exp gives 0. Not -inf: -inf - -inf and 0 * -inf, in what follows, would be NaN.
BANNED_LOGIT = -1e30


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b with sums in float32, of operands of any one type."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def head_logits(hidden: Tensor, weight: Tensor, temperature: float) -> Tensor:
    """(n, v) logits / temperature in float32. hidden (n, H) and weight (v, H) have one type."""
    logits = product(hidden, weight.T)
    # FusedLogProbs.backward divides by it, too.
    return logits if temperature == 1 else logits.div_(temperature)


def sample_tokens(logits: Tensor, uniform: Tensor | None) -> tuple[Tensor, Tensor]:
    """One id for each row of logits (R, V), and its log-probability.

    The cumulative distribution is inverted at uniform (R,) in [0, 1), float64. None takes the
    likeliest id.
    """
    logp = logits.log_softmax(1)
    if uniform is None:
        token = logp.argmax(1, keepdim=True)
    else:
        # In float64: a sum of a large vocabulary in float32 would be off by some unlikely ids.
        cdf = logp.exp().cumsum(1, dtype=torch.float64)
        # Rounded up to the whole sum, the goal would lie behind all ids.
        uniform = uniform.clamp(max=1 - 1e-9)
        goal = uniform[:, None] * cdf[:, -1:]
        token = torch.searchsorted(cdf, goal, right=True)  # (R, 1)
        # Of NaN: any id.
        token = token.clamp(max=logits.shape[1] - 1)
    logp = logp.gather(1, token)
    return token[:, 0], logp[:, 0]


class FusedLogProbs(torch.autograd.Function):
    """Log-probabilities and entropies, tile after tile of the vocabulary.

    z logits / temperature, p = softmax(z), t the target, m = max z, s = sum exp(z - m)

      log p(t) = z[t] - m - log s
      entropy  = log s - sum exp(z - m) (z - m) / s
      d log p(t) / d z         = onehot(t) - p
      d log p(t) / d hidden    = (weight[t] - sum_v p(v) weight[v]) / temperature
      d log p(t) / d weight[v] = (onehot(t)[v] - p(v)) hidden / temperature

    A running maximum keeps m and s right (online log-sum-exp). The backward makes each tile again:
    one matrix product more, but no loss needs to be known, and each gradient is written once.
    Products take operands of the type of `hidden` and sum in float32.
    """

    @staticmethod
    def tiles(hidden, weight, temperature, banned):
        """First id, last id + 1, the tile's weights (v, H) and logits (N, v)."""
        limit = TILE_SIZE[hidden.device.type] // max(hidden.shape)
        size = min(len(weight), max(256, limit))
        for i in range(0, len(weight), size):
            w = weight[i : i + size].to(hidden.dtype)
            j = i + len(w)
            z = head_logits(hidden, w, temperature)
            # One by one: a list of places would have to be copied to the GPU.
            for banned_id in banned:
                if i <= banned_id < j:
                    z[:, banned_id - i] = BANNED_LOGIT
            yield i, j, w, z

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, banned):
        peak = torch.full(targets.shape, BANNED_LOGIT, device=hidden.device)  # m, (N,)
        total = torch.zeros_like(peak)  # s
        weighted = torch.zeros_like(peak)  # sum exp(z - m) (z - m)
        chosen = torch.zeros_like(peak)  # z[t]
        for i, j, _, z in FusedLogProbs.tiles(hidden, weight, temperature, banned):
            # A target lies in one of the tiles.
            here = (targets >= i) & (targets < j)
            place = (targets - i).clamp(0, j - i - 1)
            z_of_target = z.gather(1, place[:, None])[:, 0]
            chosen = torch.where(here, z_of_target, chosen)
            old_peak = peak
            peak = torch.maximum(peak, z.amax(1))
            # What was summed up is relative to the old maximum m, and has to be to the new one, n:
            # exp(z - n) = shrink exp(z - m), and z - n = (z - m) + change.
            change = old_peak - peak
            shrink = change.exp()
            z = z.sub_(peak[:, None])
            exp = z.exp()
            weighted = shrink * (weighted + change * total)
            weighted += z.mul_(exp).sum(1)
            total = shrink * total + exp.sum(1)
        lse = peak + total.log()
        ctx.save_for_backward(hidden, weight, targets, lse)
        ctx.options = temperature, banned
        entropy = total.log() - weighted / total
        ctx.mark_non_differentiable(entropy)
        return chosen - lse, entropy

    @staticmethod
    def backward(ctx, grad, _):
        hidden, weight, targets, lse = ctx.saved_tensors
        # With adapters or a frozen head it does not.
        need_weight = ctx.needs_input_grad[1]
        temperature, banned = ctx.options
        slope = grad[:, None] / temperature  # (N, 1), d loss / d (logit of t - logsumexp)
        scaled = slope * hidden
        # The gradient of the logits is slope (onehot - p): here -p, and onehot at the end.
        factor = scaled.to(hidden.dtype)
        mean_weight = torch.zeros_like(scaled)  # sum_v p(v) weight[v]
        grad_weight = torch.zeros_like(weight) if need_weight else None
        for i, j, w, z in FusedLogProbs.tiles(hidden, weight, temperature, banned):
            p = z.sub_(lse[:, None]).exp_()
            p = p.to(hidden.dtype)
            mean_weight += product(p, w)
            if need_weight:
                grad_weight[i:j] = -product(p.T, factor)
        if need_weight:
            grad_weight.index_add_(0, targets, scaled.to(weight.dtype))
        weight_of_target = weight[targets].to(hidden.dtype)
        grad_hidden = slope * (weight_of_target - mean_weight)
        return grad_hidden.to(hidden.dtype), grad_weight, None, None, None


def fused_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: float = 1.0,
    banned: Sequence[int] = (),
) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies under softmax(hidden @ weight.T / temperature).

    hidden (N, H), weight (V, H) of any float type, targets (N,) ids, N >= 1. banned ids have
    probability 0 and are no targets. Returns (logprobs (N,), entropy (N,)) in float32;
    only logprobs carries gradients. Memory: some tiles, and what N times H or 256 numbers take.
    """
    with torch.autocast(hidden.device.type, enabled=False):
        return FusedLogProbs.apply(hidden, weight, targets, temperature, banned)


# ------------------------------------------------------------------------------- loading


def image_only(family):
    """The processor class `family` without its video half, which cannot be built without
    torchvision."""

    class ImageOnly(family):
        @classmethod
        def get_attributes(cls) -> list[str]:
            return [name for name in super().get_attributes() if name != "video_processor"]

    # A saved folder names its class.
    ImageOnly.__name__ = family.__name__
    return ImageOnly


# A smaller image is enlarged to this, in multiples of a merged patch (RadVLM).
MIN_PIXELS = 1024
# What transformers raises for a folder that holds no model.
NOT_LOADED = (OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError, SafetensorError)


def load_policy(config: Config, path: str | Path | None = None, weights: bool = True) -> Policy:
    """The policy in `path` (default: model.path): "tiny", a local model folder or a hub id.

    Without weights it can encode prompts and tell its size, at no cost. Raises InputError.
    """
    path = str(path or config.model.path)
    pixels = {"min_pixels": MIN_PIXELS, "max_pixels": config.model.max_pixels}
    if path == "tiny":
        texts = data.corpus(config)
        model, processor = build_tiny(config.seed, pixels, texts)
        return Policy(model, processor, config, path)
    is_id = path.count("/") == 1 and not path.startswith(("/", "."))
    if not is_id and not os.path.isdir(path):
        raise InputError(
            f"model {path!r}: no such folder, and not a hub id like Qwen/Qwen3-VL-2B-Instruct"
        )
    # They would break ours.
    transformers.utils.logging.disable_progress_bar()
    try:
        model = load_weights(path, weights)
        processor = load_processor(path, model, pixels)
    except NOT_LOADED as error:
        reason = str(error).strip() or repr(error)
        reason, *_ = reason.splitlines()
        raise InputError(f"model {path!r} cannot be loaded: {reason}") from None
    model_type = model.config.model_type
    head_bias = getattr(model.get_output_embeddings(), "bias", None)
    if not hasattr(model.config, "image_token_id") or head_bias is not None:
        raise InputError(
            f"model {path!r}: {model_type} has no image_token_id, or a bias in its head, so it is "
            f"none of the families that work here"
        )
    if "max_pixels" not in processor.image_processor.valid_kwargs.__annotations__:
        print0(f"model.max_pixels: no effect, {model_type} has its own image sizes")
    # Old folders keep the chat template with the tokenizer.
    processor.chat_template = processor.chat_template or processor.tokenizer.chat_template
    if not processor.chat_template:
        raise InputError(f"model {path!r} has no chat template: take an instruction-tuned one")
    return Policy(model, processor, config, path)


def load_frozen(config: Config, path: str | Path) -> Policy:
    """The policy in a checkpoint, to be evaluated. Raises InputError.

    Adapters come off the merged weights and are put beside them again, as they were in training.
    Merged and rounded to bfloat16, a small change of a large weight would be lost.
    """
    policy = load_policy(config, path)
    adapter = Path(path, "adapter")
    if config.model.precision != "float32" and adapter.exists():
        peft = json.loads((adapter / "adapter_config.json").read_text())
        policy.add_adapters(peft["r"], peft["target_modules"])
        policy.load_adapters(adapter)
        for layer in policy.adapted.values():
            layer.weight.data -= layer.scale * layer.lora_B.data @ layer.lora_A.data
    return policy.freeze_all()


def load_weights(path, weights):
    if weights:
        return AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32)
    # Shapes without numbers.
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(path))


def load_processor(path, model, pixels):
    images = AutoImageProcessor.from_pretrained(path, **pixels)
    if is_torchvision_available():
        processor = AutoProcessor.from_pretrained(path)
        processor.image_processor = images
        return processor
    family = image_only(PROCESSOR_MAPPING[type(model.config)])
    # What its from_pretrained does, with our image processor.
    settings, _ = family.get_processor_dict(path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    return family.from_args_and_dict([images, tokenizer], settings)


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
{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}
{%- endif %}
{%- endfor %}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def build_tokenizer(texts):
    """A byte-level BPE tokenizer with Qwen's special tokens, trained on `texts`."""
    import tokenizers  # noqa: PLC0415 (comes with transformers)

    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    # Digits one by one, as in Qwen.
    words = tokenizers.Regex(r"\p{N}|[^\s\p{L}\p{N}]+| ?\p{L}+|\s+")
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Split(words, "isolated"),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=1024 - len(SPECIAL_TOKENS),
        show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=SPECIAL_TOKENS,
        padding_side="left",
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


# A Qwen3-VL of 2.4 M parameters: deepstack on, patches of 14 pixels merged 2 x 2.
TINY_TEXT = dict(
    hidden_size=128,
    intermediate_size=384,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=4,
    head_dim=32,
    max_position_embeddings=4096,
    rope_parameters=dict(
        rope_type="default", rope_theta=10_000.0, mrope_section=[6, 5, 5], mrope_interleaved=True
    ),
    tie_word_embeddings=True,
)
TINY_PATCHES = dict(patch_size=14, temporal_patch_size=2)
TINY_VISION = dict(
    depth=3,
    hidden_size=128,
    intermediate_size=384,
    num_heads=4,
    spatial_merge_size=2,
    out_hidden_size=128,
    num_position_embeddings=256,
    deepstack_visual_indexes=[0, 1],
    **TINY_PATCHES,
)


def build_tiny(seed, pixels, texts):
    """The tiny Qwen3-VL with random weights, and its processor with a tokenizer for `texts`."""
    tokenizer = build_tokenizer(texts)
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    ends = {"eos_token_id": ids["<|im_end|>"], "pad_token_id": ids["<|endoftext|>"]}
    text = copy.deepcopy(TINY_TEXT) | ends | {"vocab_size": len(tokenizer)}
    marks = {
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
    }
    config = Qwen3VLConfig(
        text_config=text, vision_config=TINY_VISION, tie_word_embeddings=True, **marks
    )
    # Every process makes the same weights.
    torch.manual_seed(seed)
    model = Qwen3VLForConditionalGeneration(config)
    model.generation_config.update(**ends)
    colours = {"image_mean": [0.4] * 3, "image_std": [0.2] * 3}
    images = Qwen2VLImageProcessorPil(merge_size=2, **TINY_PATCHES, **colours, **pixels)
    processor = image_only(Qwen3VLProcessor)
    return model, processor(images, tokenizer, chat_template=tokenizer.chat_template)


# ------------------------------------------------------------------------------- checkpoints


def save_checkpoint(
    run: Path, step: int, policy: Policy, optimizer: Optimizer, is_best: bool = False, **state: Any
):
    """Write run/step_N: a model folder plus training_state.pt. Collective.

    It is the same whatever the number of processes and however weights are spread over them.
    """
    # Collective, so it comes before the first process writes alone.
    weights = policy.whole_weights()
    state["step"] = step
    state["start"] = policy.start
    state["optimizers"] = optimizer.state()
    state["bad_steps"] = optimizer.bad_steps

    def write(folder):
        policy.save(folder, weights)
        torch.save(state, folder / "training_state.pt")

    write_checkpoint(run, step, policy.config.log.keep_last, write, is_best)


def load_or_resume(
    run: Path, config: Config, start: str, section: Any
) -> tuple[Policy, Optimizer, dict]:
    """Policy, optimizer and state of run/last; without one, of a fresh start with {"step": 0}.

    section: config.sft or config.grpo. Adapters are trained on top of the checkpoint `start`.
    state: "step", and what save_checkpoint was given by name.

    A run that is resumed goes on exactly, on the same device and with the same division into
    micro-batches and processes: weights and optimiser states are saved as they are; which
    examples make up a step, and the random numbers of their samples, are functions of seed and
    step; there is no dropout; open_run refuses other settings; the log drops later lines.
    """
    last = run / "last" if last_step(run) else None
    weights = last or start
    if section.lora_rank:
        # Those below the adapters stay as they were.
        weights = start
    policy = load_policy(config, weights)
    policy.start = Path(start).resolve().name
    # Adapters, shards, what is frozen, and then the optimizer of what is left to train.
    if section.lora_rank:
        policy.add_lora(section.lora_rank, section.freeze)
        if last:
            policy.load_adapters(last / "adapter")
    if config.model.parallel == "shard" and world_size() > 1:
        policy.shard()
    policy.freeze(section.freeze)
    optimizer = Optimizer(policy, section.optimizer)
    if not last:
        return policy, optimizer, {"step": 0}

    path = last / "training_state.pt"
    state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    # The start is the reference, and what adapters belong to.
    began = state.pop("start")
    if began != policy.start:
        raise InputError(
            f"{run} began at {began} of {Path(start).parent}, and {Path(start).name} is "
            f"{policy.start} there by now; point it back, or choose another folder with out=..."
        )
    optimizer.load_state(state.pop("optimizers"))
    optimizer.bad_steps = state.pop("bad_steps")
    return policy, optimizer, state


if __name__ == "__main__":
    moved("model.py", {"memory of a run": "tools.plan_memory config.yaml --gpus 8"})
