"""Every family that the README names: a tiny random model in a folder as the hub has them, from loading to a GRPO step, against
the model's own forward on one full row that its own processor has built."""

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
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedTokenizerFast
from transformers.image_processing_utils import BaseImageProcessor

import data
import model
import train_grpo
import train_sft
from conftest import ROOT

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
    "template": model.CHAT_TEMPLATE,
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
FAMILIES = {  # vision: what may not be sampled, with the keys of those tokens that the configuration names
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
        "{% for c in m.content if c.type == 'text' %}\n{{ c.text }}{% endfor %}<|im_end|>{% endfor %}"
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
        "template": "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
        "{% for c in m.content %}{{ '<start_of_image>' if c.type == 'image' else c.text | trim }}{% endfor %}"
        "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
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
        "{{ '<IMG_CONTEXT>\n' if c.type == 'image' else c.text }}{% endfor %}<|im_end|>\n{% endfor %}"
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
        "{% for c in m.content %}{{ '<image>' if c.type == 'image' else c.text }}{% endfor %}<end_of_utterance>\n"
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


@functools.cache
def byte_pairs():
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer, bpe.decoder = (
        tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False),
        tokenizers.decoders.ByteLevel(),
    )
    bpe.train_from_iterator(
        [*QUESTIONS, *data.LABELS],
        tokenizers.trainers.BpeTrainer(
            vocab_size=320,
            show_progress=False,
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    return bpe.to_str()


def write_folder(name, folder):
    """A model folder with the files of those on the hub, made without our code."""
    family = FAMILIES[name]
    bpe = tokenizers.Tokenizer.from_str(byte_pairs())
    bpe.add_special_tokens([*family["tokens"], *family["vision"].values()])
    if "bos" in family:  # as Llama's and Gemma's, it begins every text with one
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
    tokenizer.save_pretrained(folder)
    ids = {key: bpe.token_to_id(token) for key, token in family["vision"].items() if "token" in key}
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
    for file, part in (
        ("preprocessor_config", "images"),
        ("processor_config", "processor"),
        ("video_preprocessor_config", "video"),
    ):
        if part in family:  # Qwen's folders have no processor_config.json
            content = family[part] | {"processor_class": family["processor_class"]}
            (folder / f"{file}.json").write_text(json.dumps(content))


@pytest.fixture(scope="module", params=FAMILIES)
def case(request, tmp_path_factory):
    """(description of the family, its folder, the configuration, four examples: two about one study of two images)"""
    if request.param == "idefics3" and not issubclass(
        transformers.Idefics3ImageProcessorPil, BaseImageProcessor
    ):
        pytest.skip("this version of transformers hides the image processor without torchvision")
    folder, rng = tmp_path_factory.mktemp(request.param), np.random.default_rng(2)
    write_folder(request.param, folder)
    paths = []
    for i, size in enumerate([(150, 90), (64, 64), (70, 130)]):
        paths.append(str(folder / f"{i}.png"))
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(paths[-1])
    asked = [(paths[:1], 0), (paths[1:], 1), (paths[1:], 2), (paths[1:2], 2)]
    examples = [
        data.Example(
            f"{request.param}{i}",
            "report",
            tuple(images),
            QUESTIONS[q],
            "No Pleural Effusion." * (i + 1),
        )
        for i, (images, q) in enumerate(asked)
    ]
    config = data.load_config(
        ROOT / "config.yaml",
        [
            f"model.path={folder}",
            "model.max_pixels=12544",
            "grpo.group_size=3",
            "grpo.temperature=1",
            "grpo.micro_batch=2",
        ],
    )
    return SimpleNamespace(
        **FAMILIES[request.param], name=request.param, folder=folder, cfg=config, examples=examples
    )


@pytest.fixture
def policy(case):
    return model.load_policy(case.cfg)


def plain(policy, net, case, example, ids):
    """(T, V) log-probabilities of one row, by the library alone: its template, its processor, its forward."""
    content = [{"type": "image", "image": image} for image in data.open_images(example)]
    turns = [
        {"role": "user", "content": content + [{"type": "text", "text": data.prompt_text(example)}]}
    ]
    row = policy.processor.apply_chat_template(
        turns, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    shape = row["input_ids"].shape
    more = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    row = {
        k: torch.cat([v, more.get(k, torch.zeros_like(ids))[None]], 1) if v.shape == shape else v
        for k, v in row.items()
    }
    logits = net(**row).logits[0, -len(ids) - 1 : -1].double()
    banned = policy.tokenizer.convert_tokens_to_ids(list(case.vision.values()))
    return logits.index_fill(1, torch.tensor(banned), -torch.inf).log_softmax(-1)


def own(policy, net, case, example, ids):
    return plain(policy, net, case, example, ids)[torch.arange(len(ids)), ids]


def test_sampled_equals_rescored_equals_the_library(case, policy):
    """Prompts of several lengths and images in one batch, rows that end at different times."""
    net = AutoModelForImageTextToText.from_pretrained(case.folder)
    policy.stop_ids = torch.arange(0, len(policy.tokenizer), 9)
    rollouts = policy.sample(case.examples, 3, 12, 1.0, (1, 2))
    logp, _, mask = policy.logprobs([r.prompt for r in rollouts], [r.tokens for r in rollouts])
    lengths = [r.prompt["input_ids"].shape[1] for r in rollouts]
    assert (
        len({len(t) for r in rollouts for t in r.tokens}) > 2
        and len({*lengths}) > 2
        and min(lengths) > 24
    )  # Gemma's window
    scored = logp[mask].split([len(t) for r in rollouts for t in r.tokens])
    for i, (r, example) in enumerate(zip(rollouts, case.examples)):
        for g, ids in enumerate(r.tokens):
            wanted = own(policy, net, case, example, ids)
            assert (r.logprobs[g] - wanted).abs().max() < 1e-5 and (
                scored[3 * i + g] - wanted
            ).abs().max() < 1e-5


def test_images_matter_and_stay_with_their_prompt(case, policy):
    ids = [[torch.arange(40, 46)]]
    a, b = (
        policy.encode(dataclasses.replace(e, question="x"))
        for e in (case.examples[0], case.examples[3])
    )
    alone = torch.cat([policy.logprobs([p], ids)[0] for p in (a, b)])
    assert (policy.logprobs([a, b], ids * 2)[0] - alone).abs().max() < 1e-5 and (
        alone[0] - alone[1]
    ).abs().max() > 1e-3


def test_no_image_token_is_sampled_and_turns_end_as_the_template_ends_them(case, policy):
    token = policy.tokenizer.convert_tokens_to_ids
    assert policy.banned.tolist() == sorted(token(list(case.vision.values())))
    assert policy.end_id == token(case.end) and {token(case.eos), policy.end_id} <= {
        *policy.stop_ids.tolist()
    }
    assert policy.encode_target(case.examples[0])[-1] == policy.end_id


def test_sft_then_grpo_then_saved(case, policy, tmp_path):
    """The supervised loss is that of plain rows; both steps move the weights; the saved folder is the same policy, for the
    library too."""
    net = AutoModelForImageTextToText.from_pretrained(case.folder)
    studies = data.by_study(case.examples)
    encoded = train_sft.encode_studies(policy, studies)
    n_tokens = train_sft.answer_tokens(encoded)
    loss = train_sft.sft_loss(policy, encoded, n_tokens)
    answers = [policy.encode_target(e) for e in case.examples]
    wanted = (
        -sum(own(policy, net, case, e, ids).sum() for e, ids in zip(case.examples, answers))
        / n_tokens
    )
    assert len(encoded) == 3 and n_tokens == sum(map(len, answers)) and abs(loss - wanted) < 1e-5
    optimizers = model.make_optimizers(policy, case.cfg.sft)
    loss.backward()
    assert model.optimizer_step(policy, optimizers, 1e-3, 1.0) > 0
    assert train_sft.sft_loss(policy, encoded, n_tokens) < loss - 0.01

    rollouts = policy.sample(case.examples, 3, 8, 1.0, (3,))
    train_grpo.score(rollouts, case.cfg)
    for r in rollouts:
        r.advantages = torch.tensor([1.0, -1.0, 0.0])
    before = [p.detach().clone() for p in policy.parameters()]
    sums, norm = train_grpo.update(
        policy, model.make_optimizers(policy, case.cfg.grpo), rollouts, 1e-3, case.cfg.grpo
    )
    for section in (case.cfg.sft, case.cfg.grpo):  # what both trainers say first
        assert all(size > 0 for size in model.memory_plan(policy, case.cfg, section).values())
    assert (
        sums["gap_max"] < 1e-5
        and norm > 0
        and any(not torch.equal(a, b) for a, b in zip(before, policy.parameters()))
    )

    policy.save(tmp_path / "saved")
    again, rows = model.load_policy(case.cfg, tmp_path / "saved"), [r.tokens for r in rollouts]
    assert type(again.processor).__name__ == case.processor_class
    saved = json.loads((tmp_path / "saved" / "processor_config.json").read_text())
    assert ("video_processor" in inspect.signature(type(again.processor)).parameters) == (
        "video_processor" in saved
        or (tmp_path / "saved" / "video_preprocessor_config.json").exists()
    )  # torchvision wants it
    expected = policy.logprobs([r.prompt for r in rollouts], rows)[0]
    assert torch.equal(again.logprobs([again.encode(e) for e in case.examples], rows)[0], expected)
    net = AutoModelForImageTextToText.from_pretrained(tmp_path / "saved")
    ids = rollouts[1].tokens[0]
    assert (
        own(again, net, case, case.examples[1], ids) - expected[3, : len(ids)]
    ).abs().max() < 1e-5


@pytest.mark.parametrize("freeze", [[], ["vision"], ["projector"], ["vision", "projector"]])
def test_freeze(case, policy, freeze):
    """Exactly these parameters are frozen, and they stay bit for bit what they were; what is computed stays the same."""
    names = {n.removeprefix("model."): p for n, p in policy.model.named_parameters()}
    projector = {n for n in names if n.startswith(tuple(case.projector))}
    tower = {n for n in names if n.startswith(case.tower)} - projector
    frozen = (tower if "vision" in freeze else set()) | (
        projector if "projector" in freeze else set()
    )
    assert tower and projector
    whole = policy.sample(case.examples, 2, 6, 1.0)
    optimizers = model.make_optimizers(policy, dataclasses.replace(case.cfg.grpo, freeze=freeze))
    assert {
        n for n, p in names.items() if not p.requires_grad
    } == frozen and policy.vision_frozen == (len(freeze) == 2)
    before, calls = {n: p.detach().clone() for n, p in names.items()}, []
    policy.model.get_submodule("model." + case.tower[:-1]).register_forward_hook(
        lambda *_: calls.append(1)
    )
    rollouts = policy.sample(case.examples, 2, 6, 1.0)
    logp, _, mask = policy.logprobs([r.prompt for r in rollouts], [r.tokens for r in rollouts])
    assert (logp[mask] - torch.cat([x for r in whole for x in r.logprobs])).abs().max() < 1e-5
    kept = (
        len(freeze) == 2
        and "qwen" in case.name
        and "mm_encoder_outputs" in inspect.signature(policy.base.forward).parameters
    )
    assert len(calls) == 1 if kept else len(calls) > 1  # the tower ran once, its features are kept
    logp.sum().backward()
    learnt = {n for n, p in names.items() if p.grad is not None and p.grad.any()}
    model.optimizer_step(policy, optimizers, 1e-2, 1.0)
    moved = {n for n, p in names.items() if not torch.equal(p, before[n])}
    assert not moved & frozen and learnt <= moved
    assert all(
        bool(learnt & part) != bool(part & frozen)
        for part in (tower, projector, set(names) - tower - projector)
    )


def test_lora(case, policy, tmp_path):
    """Adapters are learnt, sampled with and merged; none in a frozen part."""
    section = data.GRPOConfig(lora_rank=2, freeze=["vision", "projector"])
    policy.add_lora(section)
    layers = TEXT["num_hidden_layers"]
    assert len(policy.adapted) == 7 * layers and len(policy.parameters()) == 14 * layers
    for layer in policy.adapted.values():
        layer.lora_B.data += 0.1 * torch.randn(
            layer.lora_B.shape, generator=torch.Generator().manual_seed(1)
        )
    rollouts = policy.sample(case.examples[:2], 2, 6, 1.0)
    prompts, rows = [r.prompt for r in rollouts], [r.tokens for r in rollouts]
    logp, _, mask = policy.logprobs(prompts, rows)
    assert (logp[mask] - torch.cat([x for r in rollouts for x in r.logprobs])).abs().max() < 1e-5
    with policy.without_adapters():
        assert (policy.logprobs(prompts, rows)[0] - logp)[mask].abs().max() > 1e-3
    policy.save(tmp_path / "merged")
    merged = model.load_policy(case.cfg, tmp_path / "merged")
    assert (merged.logprobs(prompts, rows)[0] - logp).abs().max() < 1e-5


def test_pixels_where_they_mean_something(case, capsys):
    """max_pixels shrinks Qwen's images; of other families it says that it does not."""
    lengths = []
    for pixels in (3136, 12544):
        config = dataclasses.replace(
            case.cfg, model=dataclasses.replace(case.cfg.model, max_pixels=pixels)
        )
        lengths.append(model.load_policy(config).encode(case.examples[0])["input_ids"].shape[1])
    assert (
        (lengths[0] < lengths[1])
        == ("qwen" in case.name)
        == ("max_pixels: no effect" not in capsys.readouterr().out)
    )
