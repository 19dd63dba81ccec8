"""Log-probabilities, sampling, inputs and checkpoints, each against an independent computation."""

import copy
import dataclasses
import inspect
import json
import resource

import numpy as np
import pytest
import torch
from PIL import Image
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

import data
import model
from conftest import ROOT, SMALL
from model import fused_logprobs


def naive_logprobs(hidden, weight, targets, temperature, banned, bias=None):
    logits = (
        hidden.double() @ weight.double().T + (0 if bias is None else bias.double())
    ) / temperature
    if banned is not None:
        logits = logits.index_fill(1, banned, -torch.inf)
    logp = logits.log_softmax(-1)
    return logp.gather(1, targets[:, None]).squeeze(1), torch.special.entr(logp.exp()).sum(-1)


def head_inputs(dtype, biased, ban):
    """50 tokens and 700 ids: three tiles of the vocabulary, the first wholly banned or none; chunks of 13 tokens and a rest."""
    generator = torch.Generator().manual_seed(4)
    hidden = (2 * torch.randn(50, 24, generator=generator)).to(dtype).requires_grad_()
    weight = torch.randn(700, 24, generator=generator).to(dtype).requires_grad_()
    bias = torch.randn(700, generator=generator).to(dtype).requires_grad_() if biased else None
    banned = torch.tensor([*range(256), 699]) if ban else None
    targets = torch.randint(256, 699, (50,), generator=generator)
    return (
        [hidden, weight] + [bias] * biased,
        bias,
        banned,
        targets,
        torch.randn(50, generator=generator),
    )


def close(got, wanted, tolerance):
    return all(
        (a.double() - b.double()).abs().max() < tolerance * b.abs().max()
        for a, b in zip(got, wanted, strict=True)
    )


@pytest.mark.parametrize(
    "dtype, tolerance, of_gradient", [(torch.float32, 1e-5, 1e-5), (torch.bfloat16, 1e-4, 1e-2)]
)
@pytest.mark.parametrize(
    "temperature, biased, ban", [(1.0, False, False), (0.7, True, True), (1.3, False, True)]
)
def test_fused_logprobs_equals_float64(
    monkeypatch, dtype, tolerance, of_gradient, temperature, biased, ban
):
    """Values, entropies and gradients."""
    monkeypatch.setattr(model, "BUFFER", 13 * 700 // 3)
    inputs, bias, banned, targets, upstream = head_inputs(dtype, biased, ban)
    hidden, weight = inputs[:2]
    expected, expected_entropy = naive_logprobs(hidden, weight, targets, temperature, banned, bias)

    logp, entropy = fused_logprobs(hidden, weight, targets, temperature, banned, bias)
    assert logp.dtype == torch.float32 and not entropy.requires_grad
    assert close([logp, entropy], [expected, expected_entropy], tolerance)
    wanted = torch.autograd.grad(expected @ upstream.double(), inputs, retain_graph=True)
    assert close(torch.autograd.grad(logp @ upstream, inputs), wanted, of_gradient)


def test_fused_memory_is_bounded(monkeypatch):
    """No tensor larger than a tile but the inputs and their gradients, whatever the number of tokens."""
    monkeypatch.setattr(model, "BUFFER", 1 << 18)
    hidden, weight = (
        torch.randn(600, 16, requires_grad=True),
        torch.randn(5000, 16, requires_grad=True),
    )
    sizes = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            sizes.extend(
                t.numel()
                for t in (out if isinstance(out, (list, tuple)) else [out])
                if isinstance(t, torch.Tensor)
            )
            return out

    targets = torch.randint(5000, (600,))
    with Sizes():
        fused_logprobs(hidden, weight, targets)[0].sum().backward()
    assert 100_000 < max(sizes) <= 1 << 18


@pytest.mark.parametrize("vocabulary", [5, 128, 1000])
def test_draw_inverts_the_cumulative_distribution(vocabulary):
    """Against the plain cumulative sum over the whole vocabulary, with banned ids at both ends."""
    rng = np.random.default_rng(vocabulary)
    logits = torch.tensor(3 * rng.normal(size=(400, vocabulary)), dtype=torch.float32)
    logits[:, [0, -1]] = model.NEVER
    uniform = torch.tensor(rng.random(400))
    uniform[:2] = torch.tensor([0.0, 1 - 2**-53])
    token, logp = model.draw(logits.clone(), uniform)
    p = logits.double().softmax(1)
    below = p.cumsum(1)
    assert (below.gather(1, token[:, None])[:, 0] >= uniform - 1e-6).all()
    assert (
        below.gather(1, token[:, None])[:, 0] - p.gather(1, token[:, None])[:, 0] <= uniform + 1e-6
    ).all()
    assert (token == torch.searchsorted(below, uniform[:, None], right=True)[:, 0])[
        2:
    ].float().mean() > 0.99
    assert (token > 0).all() and (token < vocabulary - 1).all()
    assert (logp - p.gather(1, token[:, None])[:, 0].log()).abs().max() < 1e-5
    best, logp = model.draw(logits.clone(), None)
    assert torch.equal(best, logits.argmax(1)) and (logp - p.amax(1).log()).abs().max() < 1e-5


def test_fused_logprobs_under_fsdp():
    """A sharded head takes part as its full tensor, and its gradient comes back to the shards."""
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    try:
        torch.manual_seed(0)
        hidden, targets, head = (
            torch.randn(30, 16),
            torch.randint(300, (30,)),
            torch.nn.Linear(16, 300, bias=False),
        )
        expected, _ = fused_logprobs(hidden, head.weight, targets)
        (wanted,) = torch.autograd.grad(expected.sum(), head.weight)
        fully_shard(head, mesh=init_device_mesh("cpu", (1,)))
        logp, _ = fused_logprobs(hidden, head.weight.full_tensor(), targets)
        logp.sum().backward()
        assert (
            isinstance(head.weight.grad, DTensor)
            and torch.equal(logp, expected)
            and torch.equal(head.weight.grad.full_tensor(), wanted)
        )
    finally:
        torch.distributed.destroy_process_group()


def plain_logits(policy, prompt, ids):
    """The model's own logits for one row [prompt | ids], with nothing of ours but the inputs."""
    full = torch.cat([prompt["input_ids"], ids[None]], 1)
    types = torch.cat([prompt["mm_token_type_ids"], torch.zeros_like(ids[None])], 1)
    out = policy.model(
        input_ids=full,
        attention_mask=torch.ones_like(full),
        mm_token_type_ids=types,
        pixel_values=prompt["pixel_values"],
        image_grid_thw=prompt["image_grid_thw"],
    )
    return out.logits[0, -len(ids) - 1 : -1].index_fill(1, policy.banned, -torch.inf)


@pytest.fixture(scope="module")
def mixed(examples):
    """Prompts of different lengths and image sizes; the last has two images (frontal and lateral)."""
    grounding = next(e for e in examples if e.task == "grounding")
    two = dataclasses.replace(examples[0], id="two", images=examples[0].images + examples[3].images)
    return [examples[0], grounding, two]


@pytest.mark.parametrize("temperature", [1.0, 0.8])
def test_sampled_equals_rescored_equals_plain(policy, mixed, temperature):
    rollouts = policy.sample(mixed, 4, 15, temperature, (1, 2))
    logp, entropy, mask = policy.logprobs(
        [r.prompt for r in rollouts], [r.tokens for r in rollouts], temperature
    )
    rows = [row[m] for row, m in zip(logp, mask)]
    assert [len(x) for x in rows] == [len(t) for r in rollouts for t in r.tokens]
    for i, r in enumerate(rollouts):
        for g, ids in enumerate(r.tokens):
            reference = (plain_logits(policy, r.prompt, ids) / temperature).log_softmax(-1)
            reference = reference[torch.arange(len(ids)), ids]
            assert (r.logprobs[g] - reference).abs().max() < 1e-4
            assert (rows[4 * i + g] - reference).abs().max() < 1e-4


def variant(policy, config, family):
    """Another random model behind the same processor: Qwen3-VL with shared key heads, Qwen2.5-VL, Qwen2-VL, or gradient checkpointing."""
    if family == "checkpointing":
        config = dataclasses.replace(
            config, model=dataclasses.replace(config.model, gradient_checkpointing=True)
        )
        return model.Policy(copy.deepcopy(policy.model), policy.processor, config)
    old = policy.model.config
    text = {
        "vocab_size": old.text_config.vocab_size,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
    }
    ids = {
        k: getattr(old, k)
        for k in (
            "image_token_id",
            "video_token_id",
            "vision_start_token_id",
            "vision_end_token_id",
        )
    }
    torch.manual_seed(8)
    if family == "qwen3_vl":
        rope = {
            "rope_type": "default",
            "rope_theta": 1e4,
            "mrope_section": [2, 1, 1],
            "mrope_interleaved": True,
        }
        net = Qwen3VLForConditionalGeneration(
            Qwen3VLConfig(
                text_config={**text, "head_dim": 8, "rope_parameters": rope},
                vision_config={
                    "depth": 2,
                    "hidden_size": 32,
                    "intermediate_size": 48,
                    "num_heads": 2,
                    "patch_size": 14,
                    "out_hidden_size": 32,
                    "num_position_embeddings": 64,
                    "deepstack_visual_indexes": [0],
                },
                **ids,
                tie_word_embeddings=False,
            )
        )
    elif family == "qwen2_vl":
        rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
        net = Qwen2VLForConditionalGeneration(
            Qwen2VLConfig(
                text_config={**text, "rope_parameters": rope},
                vision_config={
                    "depth": 2,
                    "embed_dim": 32,
                    "hidden_size": 32,
                    "num_heads": 2,
                    "mlp_ratio": 2,
                    "patch_size": 14,
                },
                **ids,
                tie_word_embeddings=False,
            )
        )
    else:
        rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
        net = Qwen2_5_VLForConditionalGeneration(
            Qwen2_5_VLConfig(
                text_config={**text, "rope_parameters": rope},
                vision_config={
                    "depth": 2,
                    "hidden_size": 32,
                    "intermediate_size": 48,
                    "num_heads": 2,
                    "patch_size": 14,
                    "out_hidden_size": 32,
                    "fullatt_block_indexes": [1],
                    "window_size": 56,
                },
                **ids,
                tie_word_embeddings=False,
            )
        )
    for p in net.parameters():
        p.data += 0.1 * torch.randn(p.shape)
    net.generation_config.eos_token_id = policy.tokenizer.eos_token_id
    return model.Policy(net, policy.processor, config)


@pytest.mark.parametrize(
    "family, group_size",
    [
        ("tiny", 1),
        ("tiny", 8),
        ("qwen3_vl", 2),
        ("qwen2_5_vl", 5),
        ("qwen2_vl", 4),
        ("checkpointing", 3),
    ],
)
def test_shared_prefix_equals_plain_rows(policy, config, mixed, family, group_size):
    """Log-probabilities and every parameter's gradient; prompts of one and of several lengths, completions of one token and
    of many; and the samples."""
    policy = policy if family == "tiny" else variant(policy, config, family)
    mixed = [*mixed, dataclasses.replace(mixed[0], id="same length")]
    prompts = [policy.encode(e) for e in mixed]
    generator = torch.Generator().manual_seed(0)
    completions = [
        [
            torch.randint(10, 200, (1 + 6 * ((g + b) % 3),), generator=generator)
            for g in range(group_size)
        ]
        for b in range(len(mixed))
    ]
    results, samples, stop, ran = [], [], policy.stop_ids, []
    hook = policy.base.language_model.layers[0].register_forward_pre_hook(
        lambda _, inputs: ran.append(inputs[0].shape[:-1])
    )
    policy.stop_ids = torch.arange(
        0, len(policy.tokenizer), 8
    )  # rows end, and are retired, at different times
    for policy.shared in (True, False):
        policy.model.zero_grad()
        logp, _, mask = policy.logprobs(prompts, completions)
        (logp * torch.linspace(-1, 1, logp.numel()).view(logp.shape)).sum().backward()
        if policy.shared:  # no padding, no prompt twice, no last token
            n_tokens = sum(p["input_ids"].shape[1] for p in prompts) + sum(
                len(ids) - 1 for group in completions for ids in group
            )
            assert ran and set(ran) == {(1, n_tokens)}
        results.append(
            (
                logp.detach(),
                {
                    n: p.grad.clone()
                    for n, p in policy.model.named_parameters()
                    if p.grad is not None
                },
            )
        )
        samples.append(policy.sample(mixed, group_size, 20, 1.0, (4, 4)))
    policy.shared, policy.stop_ids = True, stop
    hook.remove()
    (a, grads_a), (b, grads_b) = results
    assert (a - b).abs().max() < 1e-5 * b.abs().max()
    assert grads_a.keys() == grads_b.keys() and any("visual" in name for name in grads_a)
    assert max(float((grads_a[n] - grads_b[n]).norm() / grads_b[n].norm()) for n in grads_a) < 1e-5
    for one, other in zip(*samples):
        assert one.texts == other.texts and all(
            (p - q).abs().max() < 1e-5 for p, q in zip(one.logprobs, other.logprobs)
        )
    assert len({len(t) for r in samples[0] for t in r.tokens}) > 2


def test_bfloat16_forward_stays_close(policy, config, mixed):
    """Under autocast: sampled and re-scored log-probabilities agree with each other and with float32 within its precision."""
    half = model.Policy(
        policy.model,
        policy.processor,
        dataclasses.replace(config, model=dataclasses.replace(config.model, precision="bfloat16")),
    )
    rollouts = half.sample(mixed, 3, 8, 1.0, (2, 2))
    prompts, rows = [r.prompt for r in rollouts], [r.tokens for r in rollouts]
    logp, _, mask = half.logprobs(prompts, rows)
    exact, _, _ = policy.logprobs(prompts, rows)
    assert logp.dtype == torch.float32 and 0 < (logp - exact)[mask].abs().max() < 0.3
    assert (logp[mask] - torch.cat([x for r in rollouts for x in r.logprobs])).abs().max() < 0.3


class Casts(TorchDispatchMode):
    """Counts the numbers that are cast to bfloat16 out of something at least as large as `size`."""

    size, total = 4096, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if (
            function is torch.ops.aten._to_copy.default
            and (kwargs or {}).get("dtype") == torch.bfloat16
            and args[0].numel() >= self.size
        ):
            self.total += args[0].numel()
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_bfloat16_casts_weights_and_keys_once(config, examples, lora_rank):
    """Not once more for every token, trained or frozen; and the prompts' keys and values are kept in half precision."""
    half = dataclasses.replace(
        config, model=dataclasses.replace(config.model, precision="bfloat16")
    )
    policy, counts = model.load_policy(half), []
    if lora_rank:
        policy.add_lora(data.GRPOConfig(lora_rank=lora_rank))
    policy.stop_ids = policy.stop_ids[:0]
    needed = [p.requires_grad for p in policy.model.parameters()]
    for length in (2, 9):
        with Casts() as casts:
            policy.sample(examples[:1], 2, length, 1.0)
        counts.append(casts.total)
    assert (
        counts[0] == counts[1] > 0
        and [p.requires_grad for p in policy.model.parameters()] == needed
    )
    with torch.no_grad(), policy.autocast():
        hidden, *prefilled = policy.prefill([policy.encode(examples[0])])
        decoder = model.SharedDecoder(policy.base, *prefilled, 2)
        decoder.step(torch.tensor([5, 6]))
    assert {t.dtype for layer in decoder.prompts + decoder.own for t in layer} == {torch.bfloat16}


def test_weights_that_have_overflowed_are_said(config, examples):
    policy = model.load_policy(config)
    with torch.no_grad():
        for p in policy.base.language_model.parameters():
            p.mul_(1e30)
    for temperature in (0.0, 1.0):
        with pytest.raises(data.InputError, match="logits are not finite"):
            policy.sample(examples[:2], 2, 4, temperature)


def test_samples_do_not_depend_on_batch_or_order(policy, mixed):
    together = policy.sample(mixed, 3, 10, 1.0, (7, 0))
    alone = [policy.sample([e], 3, 10, 1.0, (7, 0))[0] for e in reversed(mixed)][::-1]
    for a, b in zip(together, alone):
        assert a.texts == b.texts
    other_step = policy.sample(mixed, 3, 10, 1.0, (7, 1))
    assert [r.texts for r in other_step] != [r.texts for r in together]
    assert all(len(set(r.texts)) > 1 for r in together)  # samples of a group differ
    same = policy.sample([mixed[0], dataclasses.replace(mixed[0], id="other")], 3, 10, 1.0, (7, 0))
    assert (
        same[0].texts == together[0].texts != same[1].texts
    )  # ... and so do examples, by their id


def test_sampling_follows_the_distribution(policy, examples):
    """First tokens of 4,000 samples against the model's own probabilities (chi-square over the likelier tokens)."""
    prompt = policy.encode(examples[0])
    p = plain_logits(policy, prompt, torch.tensor([0]))[0].double().softmax(-1)
    (rollout,) = policy.sample([examples[0]], 4000, 1, 1.0, (3, 3))
    counts = torch.bincount(torch.cat(rollout.tokens), minlength=len(p)).double()
    likely = p > 5 / 4000
    observed, expected = (
        torch.cat([counts[likely], counts[~likely].sum()[None]]),
        4000 * torch.cat([p[likely], p[~likely].sum()[None]]),
    )
    chi2, freedom = float(((observed - expected) ** 2 / expected).sum()), len(observed) - 1
    assert abs(chi2 - freedom) < 4 * (2 * freedom) ** 0.5


def test_greedy_equals_generate(policy, mixed):
    for r in policy.sample(mixed, 1, 12, 0.0):
        out = policy.model.generate(
            **r.prompt, do_sample=False, max_new_tokens=12, suppress_tokens=policy.banned.tolist()
        )
        ids = out[0, r.prompt["input_ids"].shape[1] :]
        assert torch.equal(r.tokens[0], ids[: len(r.tokens[0])])


def test_end_of_turn_counts_and_padding_does_not(policy, examples):
    """The pad token is also a word the policy may sample: masks come from lengths, and the end token is scored."""
    end, pad = policy.tokenizer.eos_token_id, policy.tokenizer.pad_token_id
    completions = [
        [torch.tensor([50, pad, end]), torch.tensor([end]), torch.tensor([50, 51, 52, 53])]
    ]
    logp, _, mask = policy.logprobs([policy.encode(examples[0])], completions)
    assert (
        mask.sum(1).tolist() == [3, 1, 4] and bool((logp[mask] < 0).all()) and not logp[~mask].any()
    )


def test_policy_never_samples_a_vision_token(policy, examples, config):
    with torch.no_grad():
        head, _ = policy.head
        saved = head[policy.banned].clone()
        head[policy.banned] = 50 * head.mean(0)  # make them loud, either way
        loud = policy.sample(examples[:2], 8, 8, 1.0, (0, 0))
        logp, _, mask = policy.logprobs([r.prompt for r in loud], [r.tokens for r in loud])
        head[policy.banned] = saved
    assert not torch.isin(torch.cat([t for r in loud for t in r.tokens]), policy.banned).any()
    assert (torch.cat([x for r in loud for x in r.logprobs]) - logp[mask]).abs().max() < 1e-4


def test_each_patient_keeps_its_own_image(policy, examples):
    """Scores of two prompts in one batch are those of each alone: no image went to the neighbour."""
    a, b = (
        dataclasses.replace(e, question=data.QUESTIONS["report"][0])
        for e in (examples[0], examples[3])
    )
    ids = torch.tensor([60, 61, 62])
    alone = [policy.logprobs([policy.encode(e)], [[ids, ids]])[0] for e in (a, b)]
    together = policy.logprobs([policy.encode(a), policy.encode(b)], [[ids, ids], [ids, ids]])[0]
    assert (together - torch.cat(alone)).abs().max() < 1e-5
    assert (alone[0] - alone[1]).abs().max() > 1e-3  # and the image matters


def test_prompt_limit_names_the_key(policy, config, examples):
    policy.config = dataclasses.replace(
        config, model=dataclasses.replace(config.model, max_prompt_tokens=20)
    )
    try:
        with pytest.raises(data.InputError, match="model.max_prompt_tokens=20"):
            policy.encode(examples[0])
    finally:
        policy.config = config


def test_image_tokens_are_no_answer(policy, examples):
    with pytest.raises(data.InputError, match=f"{examples[0].id}: its answer contains .*image_pad"):
        policy.encode_target(dataclasses.replace(examples[0], answer="Clear <|image_pad|> lungs."))


@pytest.mark.parametrize("kind, shared", [("default", True), ("dynamic", False)])
def test_rotation_that_depends_on_the_length_is_not_shared(config, kind, shared):
    tiny, processor = model.build_tiny(0, {})
    tiny.config.text_config.rope_parameters["rope_type"] = kind
    assert model.Policy(tiny, processor, config).shared == shared


def test_no_dropout_while_training(policy):
    assert not policy.model.training


def test_transformers_reads_the_saved_folder(policy, config, examples, tmp_path):
    """Without our code: model, tokenizer and image processor; and with it: the same log-probabilities."""
    from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer

    policy.save(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    for (name, a), b in zip(policy.model.state_dict().items(), loaded.state_dict().values()):
        assert torch.equal(a, b), name
    tokenizer, images = (
        AutoTokenizer.from_pretrained(tmp_path),
        AutoImageProcessor.from_pretrained(tmp_path),
    )
    text = examples[0].answer
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text and tokenizer.chat_template
    pixels = images(images=data.open_images(examples[0]), return_tensors="pt")["pixel_values"]
    assert torch.equal(pixels, policy.encode(examples[0])["pixel_values"])
    again = model.load_policy(config, tmp_path)
    prompt, ids = policy.encode(examples[0]), [[policy.encode_target(examples[0])]]
    assert torch.equal(again.encode(examples[0])["input_ids"], prompt["input_ids"])
    assert torch.equal(again.logprobs([prompt], ids)[0], policy.logprobs([prompt], ids)[0])
    assert torch.equal(again.stop_ids, policy.stop_ids) and torch.equal(again.banned, policy.banned)


def test_a_folder_that_is_no_model(config, tmp_path):
    with pytest.raises(data.InputError, match="cannot be loaded"):
        model.load_policy(config, tmp_path)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_frozen_vision_tower(config, optimizer):
    frozen = model.load_policy(config)
    before = {n: p.detach().clone() for n, p in frozen.model.named_parameters()}
    optimizers = model.make_optimizers(
        frozen, data.SFTConfig(optimizer=optimizer, freeze=["vision", "projector"])
    )
    for p in frozen.parameters():
        p.grad = torch.ones_like(p)
    model.optimizer_step(frozen, optimizers, 0.01, 1.0)
    moved = {n for n, p in frozen.model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {n for n in before if "visual" not in n}


def test_a_frozen_tower_runs_once_per_prompt(config, mixed):
    """Sampling, update and reference share its features; gradients and numbers stay those of the whole model."""
    policy, whole = model.load_policy(config), model.load_policy(config)
    if "mm_encoder_outputs" not in inspect.signature(policy.base.forward).parameters:
        pytest.skip("this version of transformers runs the tower every time")
    model.make_optimizers(policy, dataclasses.replace(config.grpo, freeze=["vision", "projector"]))
    calls = []
    policy.base.visual.register_forward_hook(lambda *_: calls.append("policy"))
    rollouts = policy.sample(mixed, 2, 6, 1.0)
    rows = [r.tokens for r in rollouts]
    for r in rollouts:
        del r.prompt[model.FEATURES]
    expected, _, _ = whole.logprobs([r.prompt for r in rollouts], rows)
    expected.sum().backward()
    got, _, _ = policy.logprobs([r.prompt for r in rollouts], rows)
    again, _, _ = policy.logprobs([r.prompt for r in reversed(rollouts)], rows[::-1])
    got.sum().backward()
    whole.base.visual.register_forward_hook(lambda *_: calls.append("reference"))
    reference, _, _ = whole.logprobs([r.prompt for r in rollouts], rows)
    assert calls == ["policy"] * 2  # once while sampling, once after the deletion
    assert (got - expected).abs().max() < 1e-5 and (reference - expected).abs().max() < 1e-5
    assert (again.sum() - expected.sum()).abs() < 1e-4
    for p, q in zip(
        policy.base.language_model.parameters(), whole.base.language_model.parameters()
    ):
        assert (p.grad - q.grad).abs().max() < 1e-5 * max(1, q.grad.abs().max())


def test_muon_takes_the_linear_layers_and_adamw_the_rest(config):
    policy = model.load_policy(config)
    adamw, muon = model.make_optimizers(
        policy, dataclasses.replace(config.sft, optimizer="muon", weight_decay=0.0)
    )
    of = [{id(p) for group in o.param_groups for p in group["params"]} for o in (adamw, muon)]
    assert not of[0] & of[1] and of[0] | of[1] == set(map(id, policy.parameters()))
    names = {n for n, p in policy.model.named_parameters() if id(p) in of[1]}
    assert len(names) == 6 * 3 + 3 * 7 and all(
        "blocks" in n or "layers" in n or "merger" in n for n in names
    ), names
    linear = muon.param_groups[0]["params"][0]
    before, gradient = (
        linear.detach().clone(),
        torch.randn(linear.shape, generator=torch.Generator().manual_seed(1)),
    )
    for p in policy.parameters():
        p.grad = torch.zeros_like(p)
    linear.grad = gradient.clone()
    model.optimizer_step(policy, [adamw, muon], 0.01, 1e9)
    # Muon's step is the nearest orthogonal matrix to the gradient, U V^T, of root mean square 0.2 x lr. Its iteration in
    # bfloat16 is rough by design (singular values 0.7 to 1.2), so the direction is compared.
    u, _, vt = torch.linalg.svd(gradient, full_matrices=False)
    step = before - linear.detach()
    assert torch.cosine_similarity(step.flatten(), (u @ vt).flatten(), 0) > 0.97
    assert step.square().mean().sqrt() == pytest.approx(0.2 * 0.01, rel=0.2)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_checkpoints_appear_whole_or_not_at_all(policy, config, tmp_path, monkeypatch, optimizer):
    optimizers = model.make_optimizers(policy, dataclasses.replace(config.sft, optimizer=optimizer))
    model.save_checkpoint(tmp_path, 1, policy, optimizers, best=2.0)
    assert model.last_step(tmp_path) == 1 and not (tmp_path / "best").exists()
    model.save_checkpoint(tmp_path, 2, policy, optimizers, True, best=1.0)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["best", "last", "step_000002"]

    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    save = torch.save
    for limit in (1 << 20, hard):  # the disk is full while the model is written, or after it
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        monkeypatch.setattr(
            torch, "save", lambda value, path: save({"x": torch.zeros(1 << 20)}, "/dev/full")
        )
        with pytest.raises(data.InputError, match="step_000003 cannot be written"):
            model.save_checkpoint(tmp_path, 3, policy, optimizers)
        assert (
            sorted(p.name for p in tmp_path.iterdir()) == ["best", "last", "step_000002"]
            and model.last_step(tmp_path) == 2
        )
    monkeypatch.undo()
    model.save_checkpoint(
        tmp_path, 4, policy, optimizers, best=1.0
    )  # best stays at 2, last moves on
    assert model.last_step(tmp_path) == 4 and (tmp_path / "best").resolve().name == "step_000002"
    again, _, state = model.resume(
        tmp_path, config, None, dataclasses.replace(config.sft, optimizer=optimizer)
    )
    assert all(
        torch.equal(a, b)
        for a, b in zip(again.model.state_dict().values(), policy.model.state_dict().values())
    )
    assert state == {"step": 4, "best": 1.0}


def test_a_start_that_has_moved_on_is_refused(policy, config, tmp_path):
    """GRPO's reference is where it began; a later `best` of the same run is another model."""
    start, run, optimizers = (
        tmp_path / "sft",
        tmp_path / "grpo",
        model.make_optimizers(policy, config.grpo),
    )
    model.save_checkpoint(start, 1, policy, optimizers, True)
    run.mkdir()
    again, optimizers, _ = model.resume(run, config, start / "best", config.grpo)
    model.save_checkpoint(run, 1, again, optimizers)
    assert model.resume(run, config, start / "best", config.grpo)[2] == {"step": 1}
    model.save_checkpoint(start, 2, policy, optimizers, True)
    with pytest.raises(
        data.InputError,
        match="grpo began at step_000001 of .*sft, and best is step_000002 there by now",
    ):
        model.resume(run, config, start / "best", config.grpo)
    folder = (run / "last").resolve()
    (run / "last").unlink()
    folder.rename(run / "last")  # as a copy without its links has it
    with pytest.raises(data.InputError, match="grpo/last is a folder where a link was"):
        model.last_step(run)


def test_a_checkpoint_that_is_removed_by_halves_does_not_look_like_one(
    policy, config, tmp_path, monkeypatch
):
    """A kill during the removal of an old step: its folder is no step any more, and the next save clears it away."""
    optimizers, remove = model.make_optimizers(policy, config.grpo), model.shutil.rmtree
    model.save_checkpoint(tmp_path, 1, policy, optimizers)

    def killed(path, **options):
        if path.exists():
            (path / "training_state.pt").unlink(missing_ok=True)
            raise KeyboardInterrupt

    monkeypatch.setattr(model.shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        model.save_checkpoint(tmp_path, 2, policy, optimizers)
    monkeypatch.setattr(model.shutil, "rmtree", remove)
    assert [p.name for p in tmp_path.glob("step_??????")] == ["step_000002"] and model.last_step(
        tmp_path
    ) == 2
    model.save_checkpoint(tmp_path, 3, policy, optimizers)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last", "step_000003"]


def test_checkpoints_that_are_kept(config, tmp_path):
    kept = data.load_config(ROOT / "config.yaml", [*SMALL, "log.keep_last=2"])
    policy = model.load_policy(kept)
    for step in range(1, 5):
        model.save_checkpoint(tmp_path, step, policy, [], is_best=step == 1)
    assert sorted(p.name for p in tmp_path.glob("step_*")) == [
        "step_000001",
        "step_000003",
        "step_000004",
    ]


def test_changed_settings_are_refused(config, tmp_path):
    run = tmp_path / "grpo"
    model.open_run(run, config, ["grpo"])
    (run / "step_000001").mkdir()
    (run / "last").symlink_to("step_000001")
    longer = dataclasses.replace(config, grpo=dataclasses.replace(config.grpo, steps=999))
    model.open_run(run, longer, ["grpo"])
    other = dataclasses.replace(
        config, seed=3, grpo=dataclasses.replace(config.grpo, kl_coef=0.5, steps=999)
    )
    with pytest.raises(
        data.InputError,
        match=r"seed=0 \(now 3\), grpo.kl_coef=0.01 \(now 0.5\); .* What may change: .*grpo.steps",
    ):
        model.open_run(run, other, ["grpo"])


def test_log_drops_lines_after_the_resumed_step(config, tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "a": 0}\n{"step": 2, "a": 0}\n{"step": 3, "a": 0}\n{"step": 1, "b": {}'
    )
    log = model.Log(tmp_path, 2, config)
    log.metrics(3, {"reward": 0.5})
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [{"step": 1, "a": 0}, {"step": 2, "a": 0}, {"step": 3, "reward": 0.5}]


def test_tiny_model_is_a_real_qwen3_vl(policy):
    assert type(policy.model).__name__ == "Qwen3VLForConditionalGeneration"
    assert 1e6 <= sum(p.numel() for p in policy.model.parameters()) <= 3e6
    assert policy.model.config.vision_config.deepstack_visual_indexes
    assert (
        policy.tokenizer.eos_token == "<|im_end|>"
        and len(policy.tokenizer("0.57")["input_ids"]) == 4
    )


def test_processor_sees_any_image_mode(policy, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (120, 90), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    example = data.Example("a", "report", (str(tmp_path / "a.png"),), "Report.", "x")
    assert policy.encode(example)["pixel_values"].isfinite().all()


@pytest.mark.parametrize("frozen", ["[vision, projector]", "[]"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_memory_plan_is_what_a_step_keeps(config, examples, frozen, precision):
    """Activations against what autograd saves, gradients and optimizer state byte for byte."""
    shape = {
        "grpo.micro_batch": 2,
        "grpo.group_size": 8,
        "grpo.max_new_tokens": 80,
        "grpo.freeze": frozen,
        "model.precision": precision,
    }
    config = data.load_config(
        ROOT / "config.yaml", [*SMALL, *(f"{key}={value}" for key, value in shape.items())]
    )
    policy = model.load_policy(config)
    optimizers = model.make_optimizers(policy, config.grpo)
    plan = model.memory_plan(policy, config, config.grpo)
    generator, kept = torch.Generator().manual_seed(0), {}
    own = {p.data_ptr() for p in policy.model.parameters()}

    def keep(t):
        storage = t.untyped_storage()
        kept.update(
            {} if storage.data_ptr() in own else {storage.data_ptr(): (storage.nbytes(), t)}
        )
        return t

    completions = [
        [torch.randint(10, 500, (80,), generator=generator) for _ in range(8)] for _ in range(2)
    ]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        logp, _, _ = policy.logprobs([policy.encode(e) for e in examples[:2]], completions)
        loss = -logp.mean()
    loss.backward()
    assert 0.8 < sum(n for n, _ in kept.values()) / plan["activations"] < 1.05
    assert plan["gradients"] == sum(p.grad.nbytes for p in policy.parameters()) and plan[
        "weights"
    ] == sum(p.nbytes for p in policy.model.parameters())
    model.optimizer_step(policy, optimizers, 1e-4, 1.0)
    state = [
        t
        for state in optimizers[0].state_dict()["state"].values()
        for t in state.values()
        if t.ndim
    ]
    assert plan["optimizer"] == sum(t.nbytes for t in state)


def test_the_plan_of_a_model_needs_no_weights(config, policy, tmp_path):
    policy.save(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    config = dataclasses.replace(
        config, model=dataclasses.replace(config.model, path=str(tmp_path))
    )
    text = model.plan(config)
    assert (
        "\nSFT: 2.4 of 2.4 M parameters trained; about " in text
        and "\nGRPO: 0.7 of 2.4" in text
        and "keys and values" in text
    )
    bare, example = model.load_policy(config, weights=False), data.load_split(config, "val")[0]
    assert torch.equal(bare.encode(example)["input_ids"], policy.encode(example)["input_ids"])
