"""Log-probabilities, sampling, inputs and checkpoints, each against an independent computation."""

import copy
import dataclasses
import json
import resource
import shutil

import numpy as np
import pytest
import torch
from helpers import (
    SMALL,
    all_tokens,
    check_shared_prefix,
    distance,
    is_repeated,
    load,
    metrics,
    plain_logits,
    plain_logprobs,
    recorded,
    score_all,
    seeded,
    tolerance,
)
from PIL import Image
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer

import data
import model
from fast.patches import use_products
from model import Optimizer, fused_logprobs, load_or_resume, load_policy, save_checkpoint
from runtime import optimizer as optimizer_module
from runtime import processes
from runtime.checkpoint import last_step, open_run
from runtime.config import InputError
from runtime.log import Log

pytestmark = pytest.mark.gpu

# ------------------------------------------------------------------------------- the head


def float64_logprobs(hidden, weight, targets, temperature, banned):
    """Log-probs and entropies from the whole logits."""
    logits = hidden.double() @ weight.double().T
    logits = logits / temperature
    logits[:, banned] = -torch.inf
    logp = logits.log_softmax(-1)
    return logp.gather(1, targets[:, None]).squeeze(1), torch.special.entr(logp.exp()).sum(-1)


def close(got, wanted, tolerance):
    """Every tensor is within `tolerance` of the largest number of the one that is wanted."""
    return all(
        (a.double() - b.double()).abs().max() < tolerance * b.abs().max()
        for a, b in zip(got, wanted, strict=True)
    )


@pytest.mark.parametrize(
    ("dtype", "weight_dtype", "of_gradient"),
    [
        (torch.float32, torch.float32, 1e-5),
        (torch.bfloat16, torch.bfloat16, 1e-2),
        (torch.bfloat16, torch.float32, 1e-2),
    ],
    ids=["float32", "bfloat16", "bfloat16 with float32 masters"],
)
@pytest.mark.parametrize(("temperature", "ban"), [(1.0, False), (0.7, True), (1.3, True)])
def test_fused_logprobs_equals_float64(
    monkeypatch, device, dtype, weight_dtype, of_gradient, temperature, ban
):
    """Values, entropies and gradients of 50 tokens and 700 ids: three tiles of the vocabulary, the
    first wholly banned or none. Operands are rounded, sums are not: a sum in bfloat16 would be off
    by 1e-3."""
    monkeypatch.setitem(model.TILE_SIZE, device.type, 13 * 700 // 3)
    generator = seeded(4)

    def random(*shape):
        return torch.randn(shape, generator=generator).to(device)

    hidden = (2 * random(50, 24)).to(dtype).requires_grad_()
    weight = random(700, 24).to(weight_dtype).requires_grad_()
    banned = [*range(256), 699] if ban else []
    targets = torch.randint(256, 699, (50,), generator=generator).to(device)
    upstream = random(50)
    inputs = [hidden, weight]

    rounded = weight.to(dtype)
    expected = float64_logprobs(hidden, rounded, targets, temperature, banned)
    logp, entropy = fused_logprobs(hidden, weight, targets, temperature, banned)
    assert logp.dtype == torch.float32
    assert not entropy.requires_grad
    assert close([logp, entropy], expected, 1e-5)
    wanted = torch.autograd.grad(expected[0] @ upstream.double(), inputs, retain_graph=True)
    assert close(torch.autograd.grad(logp @ upstream, inputs), wanted, of_gradient)


class Sizes(TorchDispatchMode):
    """The number of elements of every tensor that an operation gives."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        outputs = out if isinstance(out, (list, tuple)) else [out]
        self.seen += [t.numel() for t in outputs if isinstance(t, torch.Tensor)]
        return out


def test_fused_memory_is_bounded(monkeypatch, device):
    """No tensor is larger than a tile but the inputs and their gradients."""
    monkeypatch.setitem(model.TILE_SIZE, device.type, 1 << 18)
    generator = seeded(1)
    hidden = torch.randn(600, 16, generator=generator).to(device).requires_grad_()
    weight = torch.randn(5000, 16, generator=generator).to(device).requires_grad_()
    targets = torch.randint(5000, (600,), generator=generator).to(device)
    with Sizes() as sizes:
        fused_logprobs(hidden, weight, targets)[0].sum().backward()
    assert 100_000 < max(sizes.seen) <= 1 << 18


@pytest.mark.parametrize("vocabulary", [5, 128, 1000])
def test_sample_tokens_inverts_the_cumulative_distribution(device, vocabulary):
    """Against the plain cumulative sum over the whole vocabulary, with banned ids at both ends."""
    rng = np.random.default_rng(vocabulary)
    logits = torch.tensor(3 * rng.normal(size=(400, vocabulary)), dtype=torch.float32)
    logits[:, [0, -1]] = model.BANNED_LOGIT
    logits = logits.to(device)
    uniform = torch.tensor(rng.random(400))
    uniform[:2] = torch.tensor([0.0, 1 - 2**-53])
    uniform = uniform.to(device)

    token, logp = model.sample_tokens(logits.clone(), uniform)
    p = logits.double().softmax(1)
    p_token = p.gather(1, token[:, None])[:, 0]
    below = p.cumsum(1)
    reached = below.gather(1, token[:, None])[:, 0]
    assert (reached >= uniform - 1e-6).all()
    assert (reached - p_token <= uniform + 1e-6).all()
    plain = torch.searchsorted(below, uniform[:, None], right=True)[:, 0]
    assert (token == plain)[2:].float().mean() > 0.99
    assert (token > 0).all()
    assert (token < vocabulary - 1).all()
    assert distance(logp, p_token.log()) < 1e-5

    best, logp = model.sample_tokens(logits.clone(), None)
    assert torch.equal(best, logits.argmax(1))
    assert distance(logp, p.amax(1).log()) < 1e-5


def test_fused_logprobs_under_fsdp(device):
    """A sharded head takes part as its full tensor; its gradient comes back to the shards."""
    backend = "nccl" if device.type == "cuda" else "gloo"
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)
    try:
        generator = seeded(0)
        hidden = torch.randn(30, 16, generator=generator).to(device)
        targets = torch.randint(300, (30,), generator=generator).to(device)
        head = torch.nn.Linear(16, 300, bias=False).to(device)
        with torch.no_grad():
            head.weight.copy_(torch.randn(300, 16, generator=generator))
        expected, _ = fused_logprobs(hidden, head.weight, targets)
        (wanted,) = torch.autograd.grad(expected.sum(), head.weight)
        fully_shard(head, mesh=init_device_mesh(device.type, (1,)))
        logp, _ = fused_logprobs(hidden, head.weight.full_tensor(), targets)
        logp.sum().backward()
        assert isinstance(head.weight.grad, DTensor)
        assert is_repeated(logp, expected)
        assert is_repeated(head.weight.grad.full_tensor(), wanted)
    finally:
        torch.distributed.destroy_process_group()


# ------------------------------------------------------------------------------- scores and samples


@pytest.fixture(scope="module")
def mixed(examples):
    """Prompts of different lengths and image sizes; the last has two images."""
    grounding = next(e for e in examples if e.task == "grounding")
    two = dataclasses.replace(examples[0], id="two", images=examples[0].images + examples[3].images)
    return [examples[0], grounding, two]


@pytest.mark.parametrize("temperature", [1.0, 0.8])
def test_sampled_equals_rescored_equals_plain(policy, mixed, temperature):
    rollouts = policy.sample(mixed, 4, 15, temperature, (1, 2))
    plain = torch.cat(
        [plain_logprobs(policy, r.prompt, ids, temperature) for r in rollouts for ids in r.tokens]
    )
    limit = tolerance("library", policy.device)
    assert distance(recorded(rollouts), plain) < limit
    assert distance(score_all(policy, rollouts, temperature), plain) < limit


@pytest.mark.parametrize("group_size", [1, 8])
def test_shared_prefix_equals_plain_rows(policy, mixed, group_size, monkeypatch):
    """Prompts of one and of several lengths. Other families: tests/test_families.py."""
    same_length = dataclasses.replace(mixed[0], id="same length")
    check_shared_prefix(policy, [*mixed, same_length], group_size, monkeypatch)


def test_shared_prefix_with_gradient_checkpointing(policy, mixed, monkeypatch):
    config = load(*SMALL, "model.gradient_checkpointing=true")
    checkpointed = model.Policy(copy.deepcopy(policy.model), policy.processor, config)
    check_shared_prefix(checkpointed, mixed, 3, monkeypatch)


def test_bfloat16_forward_stays_close(policy, mixed, monkeypatch):
    """Under autocast: sampled and scored log-probs agree with float32 within its precision."""
    with monkeypatch.context() as patch:
        patch.setattr(policy, "config", load(*SMALL, "model.precision=bfloat16"))
        rollouts = policy.sample(mixed, 3, 8, 1.0, (2, 2))
        half = score_all(policy, rollouts)
    exact = score_all(policy, rollouts)
    assert half.dtype == torch.float32
    assert 0 < distance(half, exact) < 0.3
    assert distance(half, recorded(rollouts)) < 0.3


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_overflowed_weights_are_an_error(config, examples, temperature):
    policy = load_policy(config)
    with torch.no_grad():
        for p in policy.base.language_model.parameters():
            p.mul_(1e30)
    with pytest.raises(InputError, match="logits are not finite"):
        policy.sample(examples[:2], 2, 4, temperature)


def test_samples_do_not_depend_on_batch_or_order(policy, mixed):
    together = policy.sample(mixed, 3, 10, 1.0, (7, 0))
    alone = [policy.sample([e], 3, 10, 1.0, (7, 0))[0] for e in reversed(mixed)][::-1]
    texts = [r.texts for r in together]
    assert texts == [r.texts for r in alone]
    other_step = policy.sample(mixed, 3, 10, 1.0, (7, 1))
    assert texts != [r.texts for r in other_step]
    # Samples of a group differ,
    assert all(len(set(group)) > 1 for group in texts)
    # and so do those of two examples, by their id.
    other = dataclasses.replace(mixed[0], id="other")
    same, different = policy.sample([mixed[0], other], 3, 10, 1.0, (7, 0))
    assert same.texts == texts[0]
    assert different.texts != texts[0]


def test_sampling_follows_the_distribution(policy, examples):
    """First tokens of 4,000 samples against the model's own probabilities (chi-square over the
    likelier tokens)."""
    prompt = policy.encode(examples[0])
    anything = torch.zeros(1, dtype=torch.long, device=policy.device)
    p = plain_logits(policy, prompt, anything)[0].detach().double().softmax(-1)
    (rollout,) = policy.sample([examples[0]], 4000, 1, 1.0, (3, 3))
    counts = torch.bincount(torch.cat(rollout.tokens), minlength=len(p)).double()
    likely = p > 5 / 4000
    observed = torch.cat([counts[likely], counts[~likely].sum()[None]])
    expected = 4000 * torch.cat([p[likely], p[~likely].sum()[None]])
    chi2 = float(((observed - expected).square() / expected).sum())
    freedom = len(observed) - 1
    assert abs(chi2 - freedom) < 4 * (2 * freedom) ** 0.5


def test_greedy_equals_generate(policy, mixed):
    for r in policy.sample(mixed, 1, 12, 0.0):
        out = policy.model.generate(
            **r.prompt.tokens,
            **r.prompt.images,
            do_sample=False,
            max_new_tokens=12,
            suppress_tokens=policy.banned.tolist(),
        )
        ids = out[0, len(r.prompt) :]
        assert torch.equal(r.tokens[0], ids[: len(r.tokens[0])])


def test_end_of_turn_counts_and_padding_does_not(policy, examples):
    """The pad token is also a word that may be sampled: masks come from lengths."""
    end, pad = policy.tokenizer.eos_token_id, policy.tokenizer.pad_token_id
    rows = [[50, pad, end], [end], [50, 51, 52, 53]]
    completions = [[torch.tensor(row, device=policy.device) for row in rows]]
    logp, _, mask = policy.logprobs([policy.encode(examples[0])], completions)
    assert mask.sum(1).tolist() == [3, 1, 4]
    assert (logp[mask] < 0).all()
    assert not logp[~mask].any()


def test_policy_never_samples_a_vision_token(policy, examples):
    loud = copy.deepcopy(policy)
    head = loud.head
    with torch.no_grad():
        # Either very likely or very unlikely.
        head[loud.banned] = 50 * head.mean(0)
    rollouts = loud.sample(examples[:2], 8, 8, 1.0, (0, 0))
    assert not torch.isin(torch.cat(all_tokens(rollouts)), loud.banned).any()
    gap = distance(recorded(rollouts), score_all(loud, rollouts))
    assert gap < tolerance("library", policy.device)


def test_each_patient_keeps_its_own_image(policy, examples):
    """Scores of two prompts in one batch are those of each alone."""
    question = data.QUESTIONS["report"][0]
    pair = [dataclasses.replace(e, question=question) for e in (examples[0], examples[3])]
    prompts = [policy.encode(e) for e in pair]
    ids = torch.tensor([60, 61, 62], device=policy.device)
    alone = [policy.logprobs([prompt], [[ids, ids]])[0] for prompt in prompts]
    together, _, _ = policy.logprobs(prompts, [[ids, ids], [ids, ids]])
    assert distance(together, torch.cat(alone)) < tolerance("log-probs", policy.device)
    # And the image matters.
    assert distance(alone[0], alone[1]) > 1e-3


# ------------------------------------------------------------------------------- inputs


def test_prompt_limit_names_the_key(policy, examples, monkeypatch):
    monkeypatch.setattr(policy, "config", load(*SMALL, "model.max_prompt_tokens=20"))
    with pytest.raises(InputError, match=r"model\.max_prompt_tokens=20"):
        policy.encode(examples[0])


def test_image_tokens_are_no_answer(policy, examples):
    broken = dataclasses.replace(examples[0], answer="Clear <|image_pad|> lungs.")
    with pytest.raises(InputError, match=f"{broken.id}: its answer contains .*image_pad"):
        policy.encode_target(broken)


@pytest.mark.parametrize(("kind", "shared"), [("default", True), ("dynamic", False)])
def test_rotation_that_depends_on_the_length_is_not_shared(config, kind, shared):
    tiny, processor = model.build_tiny(0, {}, data.corpus(config))
    tiny.config.text_config.rope_parameters["rope_type"] = kind
    assert model.Policy(tiny, processor, config).shared == shared


def test_no_dropout_while_training(policy):
    assert not policy.model.training


@pytest.fixture
def opening(config):
    """A policy whose chat template begins an answer with <think>, as Qwen3-VL-Thinking's."""
    policy = load_policy(config)
    assert not policy.opens_think
    del policy.opens_think
    start = "<|im_start|>assistant\n"
    policy.processor.chat_template = policy.processor.chat_template.replace(
        f"{{% if add_generation_prompt %}}{start}",
        f"{{% if add_generation_prompt %}}{start}<think>\n",
    )
    assert policy.opens_think
    return policy


def test_samples_begin_with_the_tag_that_the_template_has_opened(opening, examples):
    (rollout,) = opening.sample(examples[:1], 2, 6, 1.0)
    assert all(text.startswith("<think>") for text in rollout.texts)


def test_targets_do_not_open_the_tag_again(opening, examples):
    example = dataclasses.replace(examples[0], style="tags")
    target = opening.tokenizer.decode(opening.encode_target(example)[:-1])
    assert target.startswith(example.thinking[:20])


def test_a_sampled_target_has_the_format(opening, examples):
    for style in ("plain", "tags", "suffix"):
        example = dataclasses.replace(examples[0], style=style)
        text = opening.decode(opening.encode_target(example))
        valid, _, answer = data.parse_output(text, example.task, style)
        assert valid
        assert answer == example.answer


def test_tiny_model_is_a_real_qwen3_vl(policy):
    assert type(policy.model).__name__ == "Qwen3VLForConditionalGeneration"
    assert 1e6 <= sum(p.numel() for p in policy.model.parameters()) <= 3e6
    assert policy.model.config.vision_config.deepstack_visual_indexes
    assert policy.tokenizer.eos_token == "<|im_end|>"
    assert len(policy.tokenizer("0.57")["input_ids"]) == 4


def test_processor_sees_any_image_mode(policy, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (120, 90), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    example = data.Example("a", "report", (str(tmp_path / "a.png"),), "Report.", "x")
    assert policy.encode(example).images["pixel_values"].isfinite().all()


# ------------------------------------------------------------------------------- model folders


def test_transformers_reads_the_saved_folder(policy, examples, tmp_path):
    """Without our code: model, tokenizer and image processor."""
    policy.save(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path).state_dict()
    for name, weight in policy.model.state_dict().items():
        assert torch.equal(weight.cpu(), loaded[name]), name
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    text = examples[0].answer
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.chat_template
    images = AutoImageProcessor.from_pretrained(tmp_path)
    pixels = images(images=data.open_images(examples[0]), return_tensors="pt")["pixel_values"]
    assert torch.equal(pixels, policy.encode(examples[0]).images["pixel_values"].cpu())


def test_the_saved_folder_is_the_same_policy(policy, config, examples, tmp_path):
    policy.save(tmp_path)
    again = load_policy(config, tmp_path)
    prompt = policy.encode(examples[0])
    ids = [[policy.encode_target(examples[0])]]
    assert torch.equal(again.encode(examples[0]).input_ids, prompt.input_ids)
    assert is_repeated(again.logprobs([prompt], ids)[0], policy.logprobs([prompt], ids)[0])
    assert torch.equal(again.stop_ids, policy.stop_ids)
    assert torch.equal(again.banned, policy.banned)


def test_a_folder_that_is_no_model(config, tmp_path):
    with pytest.raises(InputError, match="cannot be loaded"):
        load_policy(config, tmp_path)


# ------------------------------------------------------------------------------- training


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_frozen_vision_tower(config, kind):
    frozen = load_policy(config)
    before = {n: p.detach().clone() for n, p in frozen.model.named_parameters()}
    frozen.freeze(["vision", "projector"])
    optimizer = Optimizer(frozen, kind)
    for p in frozen.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step(0.01)
    moved = {n for n, p in frozen.model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {n for n in before if "visual" not in n}


def test_a_frozen_tower_runs_once_per_prompt(config, mixed):
    """Sampling, update and reference share its features; gradients and numbers stay those of the
    whole model."""
    policy, whole = load_policy(config), load_policy(config)
    policy.freeze(["vision", "projector"])
    calls = []
    policy.base.visual.patch_embed.register_forward_hook(lambda *_: calls.append("policy"))
    rollouts = policy.sample(mixed, 2, 6, 1.0)
    known = [r.prompt.features for r in rollouts]
    for r in rollouts:
        r.prompt.features = None
    expected = score_all(whole, rollouts)
    expected.sum().backward()
    for r, features in zip(rollouts, known):
        r.prompt.features = features
    got = score_all(policy, rollouts)
    got.sum().backward()
    again = score_all(policy, rollouts[::-1])
    whole.base.visual.patch_embed.register_forward_hook(lambda *_: calls.append("reference"))
    reference = score_all(whole, rollouts)

    # While sampling only.
    assert calls == ["policy"]
    limit = tolerance("log-probs", policy.device)
    assert distance(got, expected) < limit
    assert distance(reference, expected) < limit
    assert abs(again.sum() - expected.sum()) < 10 * limit
    learnt = policy.base.language_model.parameters()
    for p, q in zip(learnt, whole.base.language_model.parameters()):
        error = distance(p.grad, q.grad) / max(1, float(q.grad.abs().max()))
        assert error < tolerance("gradients", policy.device)


@pytest.mark.parametrize("kernel", [(2, 14, 14), (1, 3, 5)])
def test_a_patch_embedding_is_a_convolution(device, kernel):
    generator = seeded(0)
    conv = torch.nn.Conv3d(3, 20, kernel, stride=kernel).to(device)
    patches = torch.randn(30, 3, *kernel, generator=generator).to(device)
    upstream = torch.randn(30, 20, generator=generator).to(device)
    results = []
    for layer in (conv, copy.deepcopy(conv)):
        if results:
            use_products(layer)
        out = layer(patches).view(30, 20)
        gradients = torch.autograd.grad(out, list(layer.parameters()), upstream)
        results.append([out, *gradients])
    assert type(layer) is not torch.nn.Conv3d
    assert close(*results, tolerance("gradients", device))


@pytest.mark.parametrize(
    "freeze",
    [
        lambda policy: policy.freeze(["vision"]),
        lambda policy: policy.freeze(["vision", "projector"]),
        lambda policy: policy.add_lora(2),
    ],
    ids=["tower", "tower and projector", "adapters"],
)
def test_frozen_weights_in_half_precision_change_no_number(examples, freeze):
    """Autocast rounds them to the same numbers, in values and in gradients."""
    results = []
    for halve in (False, True):
        policy = load_policy(load(*SMALL, "model.precision=bfloat16"))
        policy.halve_frozen = lambda: None
        freeze(policy)
        if halve:
            del policy.halve_frozen
            policy.halve_frozen()
        logp, _, _ = policy.logprobs([policy.encode(examples[0])], [[torch.arange(30, 50)]])
        logp.sum().backward()
        results.append([logp, *(p.grad for p in policy.parameters())])
    kinds = {p.dtype for p in policy.model.parameters() if not p.requires_grad}
    assert torch.bfloat16 in kinds
    assert all(p.dtype == torch.float32 for p in policy.parameters())
    for whole, half in zip(*results, strict=True):
        assert torch.equal(whole, half)


def test_embeddings_and_norms_stay_in_float32():
    policy = load_policy(load(*SMALL, "model.precision=bfloat16")).freeze_all()
    kept = {n for n, p in policy.model.named_parameters() if p.dtype == torch.float32}
    assert kept
    assert all("embed" in n or "norm" in n for n in kept)


def test_float32_has_no_half_precision(config):
    policy = load_policy(config).freeze_all()
    assert {p.dtype for p in policy.model.parameters()} == {torch.float32}


def test_muon_takes_the_linear_layers_and_adamw_the_rest(config):
    policy = load_policy(config)
    names = {id(p): name for name, p in policy.model.named_parameters()}

    def names_in(optimizer):
        return {names[id(p)] for group in optimizer.param_groups for p in group["params"]}

    adamw, muon = map(names_in, Optimizer(policy, "muon").optimizers)
    assert not adamw & muon
    assert adamw | muon == set(names.values())
    assert len(muon) == 6 * 3 + 3 * 7
    assert all("blocks" in n or "layers" in n or "merger" in n for n in muon)


def test_gradients_are_summed_in_one_message(monkeypatch):
    """A parameter without a gradient takes part."""
    shapes = [(3, 2), (4,), (1, 5)]
    parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in shapes]
    for p in parameters[:2]:
        p.grad = torch.randn(p.shape)
    expected = [3 * p.grad for p in parameters[:2]] + [torch.zeros(1, 5)]
    messages = []

    def all_reduce(values):
        messages.append(values.numel())
        values *= 3

    monkeypatch.setattr(processes, "world_size", lambda: 2)
    monkeypatch.setattr(processes.dist, "all_reduce", all_reduce)
    processes.sum_gradients(parameters)
    assert messages == [6 + 4 + 5]
    assert all(map(torch.equal, expected, [p.grad for p in parameters]))


def test_a_step_of_muon_is_the_nearest_orthogonal_matrix(config, monkeypatch):
    """U V^T of the gradient, of root mean square 0.2 x lr. Its iteration in bfloat16 is rough by
    design (singular values 0.7 to 1.2), so the direction is compared."""
    monkeypatch.setattr(optimizer_module, "WEIGHT_DECAY", 0.0)
    monkeypatch.setattr(optimizer_module, "GRAD_CLIP", 1e9)
    policy = load_policy(config)
    optimizer = Optimizer(policy, "muon")
    linear = optimizer.optimizers[1].param_groups[0]["params"][0]
    before = linear.detach().clone()
    gradient = torch.randn(linear.shape, generator=seeded(1)).to(policy.device)
    linear.grad = gradient.clone()
    optimizer.step(0.01)
    u, _, vt = torch.linalg.svd(gradient, full_matrices=False)
    step = before - linear.detach()
    assert torch.cosine_similarity(step.flatten(), (u @ vt).flatten(), 0) > 0.97
    assert float(step.square().mean().sqrt()) == pytest.approx(0.2 * 0.01, rel=0.2)


def test_gradients_are_clipped_to_a_norm_of_one(config):
    """The norm that is returned is the one before."""
    policy = load_policy(config)
    optimizer = Optimizer(policy, "adamw")
    seen = []
    optimizer.optimizers[0].register_step_pre_hook(
        lambda *_: seen.append(torch.cat([p.grad.flatten() for p in policy.parameters()]).norm())
    )
    for p in policy.parameters():
        p.grad = torch.ones_like(p)
    norm = optimizer.step(1e-3)
    assert norm == pytest.approx(sum(p.numel() for p in policy.parameters()) ** 0.5, rel=1e-4)
    assert float(seen[0]) == pytest.approx(1.0, rel=1e-3)


def test_steps_without_finite_gradients_change_nothing_and_are_counted_in_a_row(
    config, monkeypatch
):
    monkeypatch.setattr(optimizer_module, "MAX_BAD_STEPS", 3)
    policy = load_policy(config)
    optimizer = Optimizer(policy, "adamw")
    before = [p.detach().clone() for p in policy.parameters()]

    def step(gradient):
        for p in policy.parameters():
            p.grad = torch.full_like(p, gradient)
        return optimizer.step(1e-3)

    assert not np.isfinite([step(np.nan), step(np.inf)]).any()
    assert all(map(torch.equal, before, policy.parameters()))
    # A good step in between: the count begins anew.
    step(1.0)
    assert not any(map(torch.equal, before, policy.parameters()))
    step(np.nan)
    step(np.nan)
    with pytest.raises(InputError, match="3 optimiser steps in a row had no finite gradient"):
        step(np.nan)


# ------------------------------------------------------------------------------- checkpoints


@pytest.fixture
def optimizer(policy):
    return Optimizer(policy, "adamw")


def entries(folder):
    return sorted(path.name for path in folder.iterdir())


def no_room(monkeypatch, after_the_model):
    """The disk is full while the model is written, or after it."""
    save = torch.save

    def to_a_full_disk(_value, _path):
        save(torch.zeros(1 << 20), "/dev/full")

    monkeypatch.setattr(torch, "save", to_a_full_disk)
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard if after_the_model else 1 << 20, hard))


@pytest.mark.parametrize("after_the_model", [False, True])
def test_checkpoints_appear_whole_or_not_at_all(
    policy, optimizer, tmp_path, monkeypatch, after_the_model
):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    save_checkpoint(tmp_path, 2, policy, optimizer, True)
    try:
        no_room(monkeypatch, after_the_model)
        with pytest.raises(InputError, match="step_000003 cannot be written"):
            save_checkpoint(tmp_path, 3, policy, optimizer)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert entries(tmp_path) == ["best", "last", "step_000002"]
    assert last_step(tmp_path) == 2


def test_last_and_best_point_to_checkpoints(policy, optimizer, tmp_path):
    save_checkpoint(tmp_path, 1, policy, optimizer)
    assert last_step(tmp_path) == 1
    assert entries(tmp_path) == ["last", "step_000001"]
    save_checkpoint(tmp_path, 2, policy, optimizer, is_best=True)
    assert entries(tmp_path) == ["best", "last", "step_000002"]
    save_checkpoint(tmp_path, 4, policy, optimizer)
    assert last_step(tmp_path) == 4
    assert (tmp_path / "best").resolve().name == "step_000002"


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_checkpoint_is_what_was_saved(config, tmp_path, kind):
    """Weights, optimiser states and whatever else was given."""
    section = dataclasses.replace(config.sft, optimizer=kind)
    policy, optimizer, state = load_or_resume(tmp_path, config, "tiny", section)
    assert state == {"step": 0}
    for p in policy.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step(1e-3)
    save_checkpoint(tmp_path, 4, policy, optimizer, best=1.0)

    again, states, state = load_or_resume(tmp_path, config, "tiny", section)
    assert state == {"step": 4, "best": 1.0}
    weights = again.model.state_dict()
    for name, weight in policy.model.state_dict().items():
        assert torch.equal(weights[name], weight), name
    for one, other in zip(states.state(), optimizer.state(), strict=True):
        assert one["state"].keys() == other["state"].keys()
        for key, values in other["state"].items():
            for name, value in values.items():
                assert torch.equal(one["state"][key][name], value), name


def test_a_start_that_has_moved_on_is_refused(policy, config, optimizer, tmp_path):
    """GRPO's reference is where it began; a later `best` of the same run is another model."""
    start, run = tmp_path / "sft", tmp_path / "grpo"
    best = str(start / "best")
    save_checkpoint(start, 1, policy, optimizer, True)
    again, fresh, _ = load_or_resume(run, config, best, config.sft)
    save_checkpoint(run, 1, again, fresh)
    assert load_or_resume(run, config, best, config.sft)[2] == {"step": 1}
    save_checkpoint(start, 2, policy, optimizer, True)
    message = "grpo began at step_000001 of .*sft, and best is step_000002 there by now"
    with pytest.raises(InputError, match=message):
        load_or_resume(run, config, best, config.sft)


def test_a_copy_without_its_links_is_refused(tmp_path):
    (tmp_path / "last").mkdir()
    with pytest.raises(InputError, match="last is a folder where a link was"):
        last_step(tmp_path)


def test_a_checkpoint_that_is_removed_by_halves_does_not_look_like_one(
    policy, optimizer, tmp_path, monkeypatch
):
    """A kill during the removal of an old step: its folder is no step any more, and the next save
    clears it away."""

    def killed(path, **_options):
        if path.exists():
            (path / "training_state.pt").unlink(missing_ok=True)
            raise KeyboardInterrupt

    save_checkpoint(tmp_path, 1, policy, optimizer)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            save_checkpoint(tmp_path, 2, policy, optimizer)
    assert [p.name for p in tmp_path.glob("step_??????")] == ["step_000002"]
    assert last_step(tmp_path) == 2
    save_checkpoint(tmp_path, 3, policy, optimizer)
    assert entries(tmp_path) == ["last", "step_000003"]


def test_checkpoints_that_are_kept(tmp_path):
    policy = load_policy(load(*SMALL, "log.keep_last=2"))
    optimizer = Optimizer(policy, "adamw")
    for step in range(1, 5):
        save_checkpoint(tmp_path, step, policy, optimizer, is_best=step == 1)
    assert entries(tmp_path) == ["best", "last", "step_000001", "step_000003", "step_000004"]


def test_changed_settings_are_refused(config, tmp_path):
    run = tmp_path / "grpo"
    open_run(run, config, ["grpo"], 999)
    (run / "step_000001").mkdir()
    (run / "last").symlink_to("step_000001")
    open_run(run, load(*SMALL, "grpo.steps=999"), ["grpo"], 999)
    other = load(*SMALL, "seed=3", "grpo.kl_coef=0.5", "grpo.steps=999")
    changes = r"seed=0 \(now 3\), grpo.kl_coef=0.01 \(now 0.5\); .* may change: .*grpo.steps"
    with pytest.raises(InputError, match=changes):
        open_run(run, other, ["grpo"], 999)


def test_a_run_past_its_last_step_is_refused(config, tmp_path):
    open_run(tmp_path, config, ["grpo"], 5)
    (tmp_path / "step_000005").mkdir()
    (tmp_path / "last").symlink_to("step_000005")
    open_run(tmp_path, config, ["grpo"], 5)
    with pytest.raises(InputError, match="is at step 5, past the 4 asked for"):
        open_run(tmp_path, config, ["grpo"], 4)


def test_log_drops_lines_after_the_resumed_step(config, tmp_path):
    """Also one that a kill has cut."""
    lines = [{"step": 1, "a": 0}, {"step": 2, "a": 0}, {"step": 3, "a": 0}]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "metrics.jsonl").write_text(text + '{"step": 1, "b": {')
    log = Log(tmp_path, config, 2, 3)
    for step in log.steps():
        log.metrics(step + 1, {"reward": torch.tensor(0.5), "num_tokens": 7})
    assert metrics(tmp_path)[:2] == lines[:2]
    (row,) = metrics(tmp_path)[2:]
    assert row["step"] == 3
    assert row["reward"] == 0.5
