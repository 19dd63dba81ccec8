"""Every family that the README names: a tiny random model in a folder as the hub has them.

From loading to a GRPO step, against the library's own forward on one full row that its own
processor has built.
"""

import dataclasses
import functools
import inspect
import json
from types import SimpleNamespace

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from helpers import (
    all_tokens,
    check_shared_prefix,
    distance,
    is_repeated,
    load,
    move_weights,
    plain_logprobs,
    random_completions,
    recorded,
    score_all,
    seeded,
    tolerance,
)
from PIL import Image
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)
from transformers.image_processing_utils import BaseImageProcessor

import data
import train_grpo
from data import Example
from model import CHAT_TEMPLATE, Optimizer, Prompt, load_policy
from readers.study import LABELS
from runtime.metrics import GAP
from tools.plan_memory import memory_plan
from train_sft import count_answer_tokens, encode_studies, sft_loss

pytestmark = pytest.mark.gpu

TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 2048,
}
TOWER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 56,
    "patch_size": 14,
}
SIGLIP = TOWER | {"model_type": "siglip_vision_model", "vision_use_head": False}
QWEN_TOWER = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 2,
    "patch_size": 14,
    "out_hidden_size": 32,
}
QWEN_TEXT = TEXT | {
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
}
GRID = [[56, 56], [56, 112], [112, 56], [112, 112]]
CHATML = {
    "tokens": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    "eos": "<|im_end|>",
    "end": "<|im_end|>",
}
QWEN = CHATML | {
    "template": CHAT_TEMPLATE,
    "vision": {
        "vision_start_token_id": "<|vision_start|>",
        "vision_end_token_id": "<|vision_end|>",
        "image_token_id": "<|image_pad|>",
        "video_token_id": "<|video_pad|>",
    },
    "images": {
        "image_processor_type": "Qwen2VLImageProcessorFast",
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "size": {"shortest_edge": 3136, "longest_edge": 12845056},
        "image_mean": [0.4] * 3,
        "image_std": [0.2] * 3,
    },
    "tower": "visual.",
    "projector": ["visual.merger."],
}
# vision: what may not be sampled, with the keys of the tokens that the configuration names.
FAMILIES = {
    "qwen3_vl": QWEN
    | {
        "config": {
            "text_config": QWEN_TEXT
            | {"rope_parameters": QWEN_TEXT["rope_parameters"] | {"mrope_interleaved": True}},
            "vision_config": QWEN_TOWER
            | {"num_position_embeddings": 64, "deepstack_visual_indexes": [0]},
        },
        "processor_class": "Qwen3VLProcessor",
        "video": {"video_processor_type": "Qwen3VLVideoProcessor"},
        "projector": ["visual.merger.", "visual.deepstack_merger_list."],
    },
    "qwen2_5_vl": QWEN
    | {
        "config": {
            "text_config": QWEN_TEXT,
            "vision_config": QWEN_TOWER | {"fullatt_block_indexes": [1], "window_size": 56},
        },
        "processor_class": "Qwen2_5_VLProcessor",
    },
    "qwen2_vl": QWEN
    | {
        "config": {
            "text_config": QWEN_TEXT,
            "vision_config": {
                "depth": 2,
                "embed_dim": 32,
                "hidden_size": 32,
                "num_heads": 2,
                "mlp_ratio": 2,
                "patch_size": 14,
            },
        },
        "processor_class": "Qwen2VLProcessor",
    },
    "llava_onevision": CHATML
    | {
        "template": "{% for m in messages %}<|im_start|>{{ m.role }} "
        "{% for c in m.content if c.type == 'image' %}<image>\n{% endfor %}"
        "{% for c in m.content if c.type == 'text' %}\n{{ c.text }}{% endfor %}"
        "<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        "vision": {"image_token_index": "<image>", "video_token_index": "<video>"},
        "config": {
            "text_config": TEXT | {"model_type": "qwen2"},
            "vision_config": SIGLIP,
            "image_grid_pinpoints": GRID,
        },
        "images": {
            "image_processor_type": "LlavaOnevisionImageProcessor",
            "size": {"height": 56, "width": 56},
            "image_grid_pinpoints": GRID,
        },
        "processor_class": "LlavaOnevisionProcessor",
        "video": {"video_processor_type": "LlavaOnevisionVideoProcessor"},
        "processor": {
            "num_image_tokens": 16,
            "vision_feature_select_strategy": "full",
            "image_token": "<image>",
            "video_token": "<video>",
        },
        "tower": "vision_tower.",
        "projector": ["multi_modal_projector.", "image_newline"],
    },
    "gemma3": {
        "tokens": ["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"],
        "eos": "<eos>",
        "bos": "<bos>",
        "end": "<end_of_turn>",
        "template": "{{ bos_token }}{% for m in messages %}"
        "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
        "{% for c in m.content %}"
        "{{ '<start_of_image>' if c.type == 'image' else c.text | trim }}{% endfor %}"
        "<end_of_turn>\n{% endfor %}"
        "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
        "vision": {
            "boi_token_index": "<start_of_image>",
            "eoi_token_index": "<end_of_image>",
            "image_token_index": "<image_soft_token>",
        },
        "named": {
            "boi_token": "<start_of_image>",
            "eoi_token": "<end_of_image>",
            "image_token": "<image_soft_token>",
        },
        "config": {
            "text_config": TEXT
            | {"sliding_window": 24, "layer_types": ["sliding_attention", "full_attention"]},
            "vision_config": SIGLIP,
            "mm_tokens_per_image": 4,
        },
        "images": {
            "image_processor_type": "Gemma3ImageProcessor",
            "size": {"height": 56, "width": 56},
        },
        "processor_class": "Gemma3Processor",
        "processor": {"image_seq_length": 4},
        "tower": "vision_tower.",
        "projector": ["multi_modal_projector."],
    },
    "internvl": CHATML
    | {
        "template": "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for c in m.content %}"
        "{{ '<IMG_CONTEXT>\n' if c.type == 'image' else c.text }}{% endfor %}"
        "<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        "vision": {
            "image_token_id": "<IMG_CONTEXT>",
            "start": "<img>",
            "stop": "</img>",
            "video": "<video>",
        },
        "named": {
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        },
        "config": {
            "text_config": TEXT | {"model_type": "qwen2"},
            "vision_config": TOWER,
            "image_seq_length": 4,
        },
        "images": {
            "image_processor_type": "GotOcr2ImageProcessorFast",
            "size": {"height": 56, "width": 56},
            "crop_to_patches": True,
            "min_patches": 1,
            "max_patches": 4,
        },
        "processor_class": "InternVLProcessor",
        "processor": {"image_seq_length": 4},
        "video": {"video_processor_type": "InternVLVideoProcessor"},
        "tower": "vision_tower.",
        "projector": ["multi_modal_projector."],
    },
    "idefics3": {
        "tokens": ["<|begin_of_text|>", "<|end_of_text|>", "<end_of_utterance>"],
        "eos": "<|end_of_text|>",
        "bos": "<|begin_of_text|>",
        "end": "<end_of_utterance>",
        "template": "<|begin_of_text|>{% for m in messages %}{{ m.role.capitalize() }}"
        "{{ ':' if m.content[0].type == 'image' else ': ' }}"
        "{% for c in m.content %}{{ '<image>' if c.type == 'image' else c.text }}{% endfor %}"
        "<end_of_utterance>\n"
        "{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}",
        "vision": {
            "image_token_id": "<image>",
            "fake": "<fake_token_around_image>",
            "global": "<global-img>",
            **{f"{i}{j}": f"<row_{i}_col_{j}>" for i in (1, 2) for j in (1, 2)},
        },
        "config": {
            "text_config": TEXT | {"model_type": "llama"},
            "vision_config": TOWER,
            "scale_factor": 2,
        },
        "images": {
            "image_processor_type": "Idefics3ImageProcessor",
            "size": {"longest_edge": 112},
            "max_image_size": {"longest_edge": 56},
        },
        "processor_class": "Idefics3Processor",
        "processor": {"image_seq_len": 4},
        "tower": "vision_model.",
        "projector": ["connector."],
    },
}
QUESTIONS = [
    "Describe.",
    "Is there a pleural effusion, and where is it? Give boxes.",
    "Where is the heart?",
]
# Qwen's folders have no processor_config.json.
FILES = {
    "images": "preprocessor_config.json",
    "processor": "processor_config.json",
    "video": "video_preprocessor_config.json",
}

# ------------------------------------------------------------------------------- folders


@functools.cache
def byte_pairs():
    """A tokenizer as text, without special tokens."""
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=320, show_progress=False, initial_alphabet=alphabet
    )
    bpe.train_from_iterator([*QUESTIONS, *LABELS], trainer)
    return bpe.to_str()


def build_tokenizer(family):
    bpe = tokenizers.Tokenizer.from_str(byte_pairs())
    bpe.add_special_tokens([*family["tokens"], *family["vision"].values()])
    if "bos" in family:
        # As Llama's and Gemma's, it begins every text with one.
        bos = family["bos"]
        bpe.post_processor = tokenizers.processors.TemplateProcessing(
            f"{bos} $A", None, [(bos, bpe.token_to_id(bos))]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=family["eos"],
        pad_token=family["tokens"][0],
        bos_token=family.get("bos"),
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
        extra_special_tokens=family.get("named", {}),
    )
    tokenizer.chat_template = family["template"]
    return tokenizer


def write_folder(name, folder):
    """A model folder with the files of those on the hub, made without our code."""
    family = FAMILIES[name]
    tokenizer = build_tokenizer(family)
    tokenizer.save_pretrained(folder)
    to_id = tokenizer.convert_tokens_to_ids
    ids = {key: to_id(token) for key, token in family["vision"].items() if "token" in key}
    config = AutoConfig.for_model(name, **family["config"], **ids, tie_word_embeddings=False)
    config.text_config.vocab_size = len(tokenizer)
    config.text_config.pad_token_id = config.text_config.bos_token_id = None
    config.text_config.eos_token_id = tokenizer.eos_token_id
    torch.manual_seed(5)
    net = AutoModelForImageTextToText.from_config(config)
    for p in net.parameters():
        p.data += 0.1 * torch.randn(p.shape)
    net.generation_config.eos_token_id = tokenizer.eos_token_id
    net.save_pretrained(folder)
    for part, file in FILES.items():
        if part in family:
            content = family[part] | {"processor_class": family["processor_class"]}
            (folder / file).write_text(json.dumps(content))


def write_images(folder):
    """Three images of different sizes."""
    rng = np.random.default_rng(2)
    paths = []
    for i, size in enumerate([(150, 90), (64, 64), (70, 130)]):
        paths.append(str(folder / f"{i}.png"))
        pixels = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(paths[-1])
    return paths


@pytest.fixture(scope="module", params=FAMILIES)
def case(request, tmp_path_factory):
    """A family, its folder, its configuration, and four examples, two of them about one study."""
    name = request.param
    hidden = not issubclass(transformers.Idefics3ImageProcessorPil, BaseImageProcessor)
    if name == "idefics3" and hidden:
        pytest.skip("this version of transformers hides the image processor without torchvision")
    folder = tmp_path_factory.mktemp(name)
    write_folder(name, folder)
    paths = write_images(folder)
    asked = [(paths[:1], 0), (paths[1:], 1), (paths[1:], 2), (paths[1:2], 2)]
    examples = []
    for i, (images, question) in enumerate(asked):
        answer = "No Pleural Effusion." * (i + 1)
        example = Example(f"{name}{i}", "report", tuple(images), QUESTIONS[question], answer)
        examples.append(example)
    config = load(
        f"model.path={folder}",
        "model.max_pixels=12544",
        "grpo.group_size=3",
        "grpo.temperature=1",
        "grpo.micro_tokens=300",
        "grpo.kl_coef=0",
    )
    return SimpleNamespace(
        **FAMILIES[name], name=name, folder=folder, cfg=config, examples=examples
    )


@pytest.fixture
def policy(case):
    return load_policy(case.cfg)


# ------------------------------------------------------------------------------- the library alone


def load_library(case, folder, device):
    """The library's model, and the ids that may not be sampled, by the family's own list."""
    net = AutoModelForImageTextToText.from_pretrained(folder).to(device)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    banned = tokenizer.convert_tokens_to_ids(list(case.vision.values()))
    return SimpleNamespace(model=net, banned=torch.tensor(banned, device=device))


@pytest.fixture
def library(case, policy):
    return load_library(case, case.folder, policy.device)


def library_prompt(policy, example):
    """The inputs that the library's own template and processor make of an example."""
    content = [{"type": "image", "image": image} for image in data.open_images(example)]
    content.append({"type": "text", "text": data.prompt_text(example)})
    inputs = policy.processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    tokens, images = {}, {}
    for name, values in inputs.items():
        has_tokens = values.shape == inputs["input_ids"].shape
        (tokens if has_tokens else images)[name] = values.to(policy.device)
    # The library finds the positions by itself.
    return Prompt(tokens, None, 0, images)


def library_logprobs(policy, library, example, ids):
    return plain_logprobs(library, library_prompt(policy, example), ids).detach()


# ------------------------------------------------------------------------------- tests


def test_sampled_equals_rescored_equals_the_library(case, policy, library):
    """Prompts of several lengths and images in one batch, rows that end at different times."""
    policy.stop_ids = torch.arange(0, len(policy.tokenizer), 9, device=policy.device)
    rollouts = policy.sample(case.examples, 3, 12, 1.0, (1, 2))
    lengths = {len(r.prompt) for r in rollouts}
    assert len(lengths) > 2
    # Longer than Gemma's window.
    assert min(lengths) > 24
    assert len({len(ids) for ids in all_tokens(rollouts)}) > 2

    wanted = []
    for r, example in zip(rollouts, case.examples):
        wanted += [library_logprobs(policy, library, example, ids) for ids in r.tokens]
    wanted = torch.cat(wanted)
    limit = tolerance("log-probs", policy.device)
    assert distance(recorded(rollouts), wanted) < limit
    assert distance(score_all(policy, rollouts), wanted) < limit


@pytest.mark.parametrize("group_size", [2, 5])
def test_shared_prefix_equals_plain_rows(case, policy, group_size, monkeypatch):
    """Qwen-VL only: with shared key heads, with windows in the vision tower, with deepstack."""
    assert policy.shared == ("qwen" in case.name)
    if policy.shared:
        same_length = dataclasses.replace(case.examples[0], id="same length")
        examples = [*case.examples, same_length]
        check_shared_prefix(policy, examples, group_size, monkeypatch)


def test_images_matter_and_stay_with_their_prompt(case, policy):
    pair = [dataclasses.replace(e, question="x") for e in (case.examples[0], case.examples[3])]
    prompts = [policy.encode(e) for e in pair]
    ids = [[torch.arange(40, 46, device=policy.device)]]
    alone = torch.cat([policy.logprobs([prompt], ids)[0] for prompt in prompts])
    together, _, _ = policy.logprobs(prompts, ids * 2)
    assert distance(together, alone) < tolerance("log-probs", policy.device)
    assert distance(alone[0], alone[1]) > 1e-3


def test_no_image_token_is_sampled(case, policy):
    ids = policy.tokenizer.convert_tokens_to_ids(list(case.vision.values()))
    assert policy.banned.tolist() == sorted(ids)


def test_turns_end_as_the_template_ends_them(case, policy):
    to_id = policy.tokenizer.convert_tokens_to_ids
    assert policy.end_id == to_id(case.end)
    assert {to_id(case.eos), policy.end_id} <= set(policy.stop_ids.tolist())
    assert policy.encode_target(case.examples[0])[-1] == policy.end_id


def test_the_supervised_loss_is_that_of_plain_rows(case, policy, library):
    """And a step lowers it."""
    encoded = encode_studies(policy, data.by_study(case.examples))
    assert len(encoded) == 3
    answers = [policy.encode_target(e) for e in case.examples]
    n_tokens = count_answer_tokens(encoded)
    assert n_tokens == sum(map(len, answers))
    loss = sft_loss(policy, encoded, n_tokens)
    pairs = zip(case.examples, answers)
    wanted = -sum(library_logprobs(policy, library, e, ids).sum() for e, ids in pairs) / n_tokens
    assert distance(loss, wanted) < tolerance("log-probs", policy.device)

    policy.freeze(case.cfg.sft.freeze)
    optimizer = Optimizer(policy, case.cfg.sft.optimizer)
    loss.backward()
    assert optimizer.step(1e-3) > 0
    assert sft_loss(policy, encoded, n_tokens) < loss - 0.01


def test_a_step_of_grpo(case, policy):
    grpo = dataclasses.replace(case.cfg.grpo, lr=1e-3)
    policy.freeze(grpo.freeze)
    rollouts = policy.sample(case.examples, 3, 8, 1.0, (3,))
    train_grpo.score(rollouts, case.cfg)
    for r in rollouts:
        assert len(r.rewards) == 3
        r.advantages = torch.tensor([1.0, -1.0, 0.0])
    before = [p.detach().clone() for p in policy.parameters()]
    result = train_grpo.update(policy, Optimizer(policy, grpo.optimizer), rollouts, grpo)
    gap = max(part[f"{GAP}/max"] for part in result.sums)
    assert gap < tolerance("log-probs", policy.device)
    assert result.grad_norm > 0
    assert not all(map(torch.equal, before, policy.parameters()))


@pytest.mark.parametrize("stage", ["sft", "grpo"])
def test_memory_can_be_planned(case, policy, stage):
    plan = memory_plan(policy, case.cfg, getattr(case.cfg, stage))
    assert min(plan.values()) > 0


def test_the_saved_folder_is_the_same_policy(case, policy, tmp_path):
    """For the library, too."""
    move_weights(policy, 0.01, seed=3)
    policy.save(tmp_path)
    again = load_policy(case.cfg, tmp_path)
    assert type(again.processor).__name__ == case.processor_class
    rows = random_completions([[5, 8]] * 4, 1, policy.device)
    expected, _, _ = policy.logprobs([policy.encode(e) for e in case.examples], rows)
    got, _, _ = again.logprobs([again.encode(e) for e in case.examples], rows)
    assert is_repeated(got, expected)
    library = load_library(case, tmp_path, policy.device)
    theirs = library_logprobs(again, library, case.examples[1], rows[1][1])
    assert distance(theirs, expected[3]) < tolerance("log-probs", policy.device)


def test_the_saved_folder_has_a_video_part_where_torchvision_wants_it(case, policy, tmp_path):
    policy.save(tmp_path)
    wanted = "video_processor" in inspect.signature(type(policy.processor)).parameters
    saved = json.loads((tmp_path / "processor_config.json").read_text())
    file = tmp_path / "video_preprocessor_config.json"
    assert wanted == ("video_processor" in saved or file.exists())


@pytest.mark.parametrize("freeze", [[], ["vision"], ["projector"], ["vision", "projector"]])
def test_freeze(case, policy, freeze):
    """Exactly these parts stay bit for bit what they were; what is computed stays the same."""
    names = {n.removeprefix("model."): p for n, p in policy.model.named_parameters()}
    projector = {n for n in names if n.startswith(tuple(case.projector))}
    tower = {n for n in names if n.startswith(case.tower)} - projector
    parts = {"vision": tower, "projector": projector}
    parts["language"] = set(names) - tower - projector
    assert all(parts.values())
    frozen = set().union(*(parts[part] for part in freeze))
    whole = policy.sample(case.examples, 2, 6, 1.0)

    policy.freeze(freeze)
    assert {n for n, p in names.items() if not p.requires_grad} == frozen
    assert policy.vision_frozen == (len(freeze) == 2)
    before = {n: p.detach().clone() for n, p in names.items()}
    calls = []
    vision = policy.model.get_submodule("model." + case.tower[:-1])
    first = next(vision.children())
    first.register_forward_hook(lambda *_: calls.append(1))
    rollouts = policy.sample(case.examples, 2, 6, 1.0)
    logp = score_all(policy, rollouts)
    assert distance(logp, recorded(whole)) < tolerance("log-probs", policy.device)
    # Where features are kept, the tower runs once.
    kept = len(freeze) == 2 and "qwen" in case.name
    assert calls
    assert (len(calls) == 1) == kept

    logp.sum().backward()
    learnt = {n for n, p in names.items() if p.grad is not None and p.grad.any()}
    Optimizer(policy, "adamw").step(1e-2)
    moved = {n for n, p in names.items() if not torch.equal(p, before[n])}
    assert not moved & frozen
    assert learnt <= moved
    for part, members in parts.items():
        assert bool(learnt & members) != (part in freeze), part


def test_lora(case, policy, tmp_path):
    """Adapters are learnt, sampled with and merged; none in a frozen part."""
    policy.add_lora(2, ["vision", "projector"])
    layers = TEXT["num_hidden_layers"]
    assert len(policy.adapted) == 7 * layers
    assert len(policy.parameters()) == 14 * layers
    for layer in policy.adapted.values():
        noise = torch.randn(layer.lora_B.shape, generator=seeded(1)) / 10
        layer.lora_B.data += noise.to(policy.device)
    rollouts = policy.sample(case.examples[:2], 2, 6, 1.0)
    logp = score_all(policy, rollouts)
    limit = tolerance("log-probs", policy.device)
    assert distance(logp, recorded(rollouts)) < limit
    with policy.without_adapters():
        assert distance(score_all(policy, rollouts), logp) > 1e-3
    policy.save(tmp_path / "merged")
    merged = load_policy(case.cfg, tmp_path / "merged")
    assert distance(score_all(merged, rollouts), logp) < limit


def test_pixels_where_they_mean_something(case, capsys):
    """max_pixels shrinks Qwen's images. For other families a line says that it has no effect."""
    lengths = []
    for pixels in (3136, 12544):
        config = load(f"model.path={case.folder}", f"model.max_pixels={pixels}")
        lengths.append(len(load_policy(config).encode(case.examples[0])))
    shrunk = lengths[0] < lengths[1]
    assert shrunk == ("qwen" in case.name)
    assert shrunk != ("max_pixels: no effect" in capsys.readouterr().out)
