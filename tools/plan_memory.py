"""How much memory does a run need?  Without loading its weights; of a hub model, only its
configuration and processor are fetched.

  python -m tools.plan_memory config.yaml [key=value ...] --gpus 8

Estimates for one process, by part. Activations are those of a plain Qwen: what the backward of one
layer keeps for a token, times layers and tokens; with gradient checkpointing the inputs of all
layers, and everything of one. SFT counts 256 tokens of questions and answers a study.
"""

from dataclasses import dataclass

import numpy as np
from transformers.modeling_layers import GradientCheckpointingLayer

import data
from model import TILE_SIZE, load_policy
from runtime.output import world_size
from runtime.processes import parse_args, run_main

FLOAT = 4  # bytes
PROMPT_TEXT = 64  # tokens of a question and the chat template
ANSWER = 256  # tokens of a study's questions and answers in SFT


@dataclass
class Batch:
    """What one forward and backward pass holds."""

    prompts: int
    prompt_tokens: int
    patches: int  # of a prompt's images
    rows: int  # completions of a prompt
    row_tokens: int

    def tokens(self, shared):
        """With a shared prefix, a prompt counts once and not once per row."""
        if shared:
            return self.prompts * (self.prompt_tokens + self.rows * self.row_tokens)
        return self.prompts * self.rows * (self.prompt_tokens + self.row_tokens)


def prompt_size(config, vision):
    """Patches and tokens of a prompt whose images are as large as model.max_pixels allows."""
    images = 1
    for source in data.sources(config, "train"):
        if source.source in ("iu_xray", "mimic_cxr") and source.views == "all":
            images = 2
    # InternVL's patch size has two sides.
    side = int(np.max(getattr(vision, "patch_size", 14)))
    patches = images * config.model.max_pixels // side**2
    tokens = patches // getattr(vision, "spatial_merge_size", 2) ** 2 + PROMPT_TEXT
    return patches, min(config.model.max_prompt_tokens, tokens)


def largest_batch(config, section, vision, gpus):
    """The largest micro-batch of a stage."""
    patches, prompt_tokens = prompt_size(config, vision)
    if section is config.grpo:
        local = -(-section.prompts // gpus)
        rows, row_tokens = section.group_size, section.max_new_tokens
    else:
        local = -(-section.batch_size // gpus)
        rows, row_tokens = 1, ANSWER
    prompts = min(section.micro_batch, local)
    return Batch(prompts, prompt_tokens, patches, rows, row_tokens)


def text_activations(policy, batch, kv_width, width):
    """Bytes that the backward of the language model needs."""
    text = policy.model.config.get_text_config()
    layers, hidden = text.num_hidden_layers, text.hidden_size
    query_width = text.num_attention_heads * head_size(text)
    # Norms and rotations in float32, the operands of projections, attention and MLP in `width`.
    products = query_width + kv_width + text.intermediate_size
    per_token = 24 * hidden + 12 * (query_width + kv_width) + 4 * width * products
    tokens = batch.tokens(policy.shared)
    if policy.config.model.gradient_checkpointing:
        return tokens * (FLOAT * hidden * layers + per_token)
    return tokens * per_token * layers


def vision_activations(policy, batch, vision):
    """Bytes that the backward of the vision tower needs."""
    if vision is None or policy.vision_frozen:
        return 0
    depth = getattr(vision, "depth", None) or vision.num_hidden_layers
    width = vision.hidden_size
    mlp = getattr(vision, "intermediate_size", None) or 4 * width
    per_patch = FLOAT * (12 * width + 4 * mlp)
    kept = per_patch * depth
    if policy.config.model.gradient_checkpointing:
        kept = FLOAT * width * depth + per_patch
    return batch.prompts * batch.patches * kept


def head_size(text):
    return getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads


def memory_plan(policy, config, section, gpus=None):
    """Bytes that a process needs for config.sft or config.grpo, by part.

    The policy is ready to be trained (frozen parts, adapters) and needs no weights. gpus: how many
    processes there are; None: those that run now.
    """
    gpus = gpus or world_size()
    shares = gpus if config.model.parallel == "shard" else 1
    width = 2 if config.model.precision == "bfloat16" else FLOAT  # bytes of an operand
    text = policy.model.config.get_text_config()
    vision = getattr(policy.model.config, "vision_config", None)
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    kv_width = heads * head_size(text)
    batch = largest_batch(config, section, vision, gpus)
    total = sum(p.numel() for p in policy.model.parameters())
    trained = sum(p.numel() for p in policy.parameters())
    grpo = section is config.grpo

    activations = text_activations(policy, batch, kv_width, width)
    parts = {
        "weights": FLOAT * total / shares,
        "gradients": FLOAT * trained / shares,
        "optimizer": 2 * FLOAT * trained / shares,
        "activations": activations + vision_activations(policy, batch, vision),
        "logits": FLOAT * TILE_SIZE,
    }
    if width == 2 and shares == 1:
        # Autocast's copies.
        parts["half-precision weights"] = 2 * total
    if shares > 1:
        blocks = [m for m in policy.model.modules() if isinstance(m, GradientCheckpointingLayer)]
        sizes = [sum(p.numel() for p in block.parameters()) for block in blocks]
        # To sample, all blocks at once; else one and the next.
        gathered = sum(sizes) if grpo else 2 * max(sizes)
        parts["gathered weights"] = FLOAT * (total - sum(sizes)) + width * gathered
    if grpo:
        sampled = min(section.sample_batch, -(-section.prompts // gpus))
        tokens = sampled * (batch.prompt_tokens + batch.rows * batch.row_tokens)
        parts["keys and values"] = tokens * 2 * kv_width * text.num_hidden_layers * width
        if section.kl_coef and not section.lora_rank:
            parts["reference"] = FLOAT * total / shares
    return parts


def plan(config, gpus=1):
    """A line for each stage: the sum in GB, and its parts, the largest first."""
    lines = [f"model.parallel={config.model.parallel} on {gpus} GPU{'s' if gpus > 1 else ''}"]
    for name, section in (("SFT", config.sft), ("GRPO", config.grpo)):
        policy = load_policy(config, weights=False)
        if section.lora_rank:
            policy.add_lora(section.lora_rank, section.freeze)
        policy.freeze(section.freeze)
        total = sum(p.numel() for p in policy.model.parameters()) / 1e6
        trained = sum(p.numel() for p in policy.parameters()) / 1e6

        sizes = memory_plan(policy, config, section, gpus)
        order = sorted(sizes, key=sizes.get, reverse=True)
        parts = ", ".join(f"{part} {sizes[part] / 1e9:.1f}" for part in order)
        lines.append(
            f"{name}: {trained:.1f} of {total:.1f} M parameters trained; about "
            f"{sum(sizes.values()) / 1e9:.1f} GB per process: {parts}"
        )
    return "\n".join(lines)


def main():
    config, args = parse_args(__doc__, gpus={"type": int, "default": 1})
    print(plan(config, args.gpus))


if __name__ == "__main__":
    run_main(main)
