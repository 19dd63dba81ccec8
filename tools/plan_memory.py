"""How much memory does a run need?  Without loading its weights; of a hub model, only its
configuration and processor are fetched.

  python -m tools.plan_memory config.yaml [key=value ...] --gpus 8

Estimates for one process, by part. Activations are those of a plain Qwen: what the backward keeps
of a token in a layer goes with the outputs of its linear parts; with gradient checkpointing it
keeps the inputs of all layers, and everything of one. SFT counts 256 tokens of questions and
answers a study.
"""

import numpy as np
from torch import nn

import data
from model import TILE_SIZE, load_policy, part_of
from runtime.processes import parse_args, run_main

FLOAT = 4  # bytes
PROMPT_TEXT = 64  # tokens of a question and the chat template
ANSWER = 256  # tokens of a study's questions and answers in SFT


def count(parameters):
    return sum(p.numel() for p in parameters)


def size_of(parameters):
    """In bytes, each in its own precision."""
    return sum(p.nbytes for p in parameters)


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


def linear_parts(policy, part):
    """How many blocks a part has (None: the language model, or "vision"), and the linear layers of
    the first, by their names."""
    blocks = [block for name, block in policy.blocks().items() if part_of(name) == part]
    named = blocks[0].named_modules()
    return len(blocks), {name: m for name, m in named if isinstance(m, nn.Linear)}


def kept(policy, part):
    """Bytes for the backward of one token, or of one patch."""
    count, linear = linear_parts(policy, part)
    outputs = sum(m.out_features for m in linear.values())
    # Norms, rotations and sums in float32, operands of products in their type: fitted to Qwen3-VL.
    of_block = outputs * (4.4 + 1.8 * policy.dtype.itemsize)
    if not policy.config.model.gradient_checkpointing:
        return count * of_block
    first, *_ = linear.values()
    return count * FLOAT * first.in_features + of_block


def memory_plan(policy, config, section, gpus=1):
    """{part: bytes} that each of `gpus` processes needs for config.sft or config.grpo.

    The policy is ready to be trained (frozen parts, adapters) and needs no weights.
    """
    shares = gpus if config.model.parallel == "shard" else 1
    operand = policy.dtype.itemsize
    text = policy.model.config.get_text_config()
    trained = FLOAT * count(policy.parameters())
    patches, prompt_tokens = prompt_size(config, policy.model.config.vision_config)

    # Prompts of a process and of a micro-batch, and tokens of all completions of a prompt.
    if section is config.grpo:
        local = -(-section.prompts // gpus)
        rows = section.group_size
        new_tokens = rows * section.max_new_tokens
        # With grpo.micro_tokens=0, as many as fit: here the least.
        prompts = max(1, section.micro_tokens // (prompt_tokens + new_tokens))
    else:
        local = -(-section.batch_size // gpus)
        rows = 1
        new_tokens = ANSWER
        prompts = section.micro_batch
    prompts = min(prompts, local)
    # With a shared prefix, a prompt counts once and not once per completion.
    copies = 1 if policy.shared else rows
    tokens = prompts * (copies * prompt_tokens + new_tokens)
    activations = tokens * kept(policy, None)
    if not policy.vision_frozen:
        activations += prompts * patches * kept(policy, "vision")
    # Of the head: logits, their exponentials, and these in half precision.
    logits = min(TILE_SIZE["cuda"], prompts * new_tokens * text.vocab_size)
    parts = {
        "gradients": trained / shares,
        "optimizer": 2 * trained / shares,
        "activations": activations,
        "logits": (2 * FLOAT + operand) * logits,
    }
    parts |= weight_sizes(policy, config, section, shares)
    if section is config.grpo:
        # The buffers of fast/ are in half precision.
        layers, linear = linear_parts(policy, None)
        keys = linear["self_attn.k_proj"].out_features
        sampled = min(section.sample_batch, local) * (prompt_tokens + new_tokens)
        parts["keys and values"] = sampled * 2 * keys * layers * operand
    return parts


def weight_sizes(policy, config, section, shares):
    """{part: bytes} of the weights and their copies."""
    parameters = list(policy.model.parameters())
    has_reference = section is config.grpo and section.kl_coef and not section.lora_rank
    operand = policy.dtype.itemsize
    parts = {}
    if shares > 1:
        total = count(parameters)
        parts["weights"] = FLOAT * total / shares
        if has_reference:
            parts["reference"] = parts["weights"]
        sizes = [count(block.parameters()) for block in policy.blocks().values()]
        # To sample, all blocks at once; else one and the next.
        gathered = sum(sizes) if section is config.grpo else 2 * max(sizes)
        parts["gathered weights"] = FLOAT * (total - sum(sizes)) + operand * gathered
        return parts

    # What is frozen is held in model.precision.
    parts["weights"] = size_of(parameters)
    if has_reference:
        reference = load_policy(config, weights=False).freeze_all()
        parts["reference"] = size_of(reference.model.parameters())
    if operand < FLOAT:
        # Of what is trained: autocast's copies, and those of the decoder, which has a head, too.
        trained = count(policy.parameters())
        decoder = trained + policy.head.numel() if section is config.grpo else 0
        parts["half-precision copies"] = operand * (trained + decoder)
    return parts


def plan(config, gpus=1):
    """A line for each stage: the sum in GB, and its parts, the largest first."""
    lines = [f"model.parallel={config.model.parallel}, GPUs: {gpus}"]
    for name, section in (("SFT", config.sft), ("GRPO", config.grpo)):
        policy = load_policy(config, weights=False)
        if section.lora_rank:
            policy.add_lora(section.lora_rank, section.freeze)
        policy.freeze(section.freeze)
        total = count(policy.model.parameters()) / 1e6
        trained = count(policy.parameters()) / 1e6
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
