"""Weights replicated or sharded over processes give what one process gives, whatever each does."""

import dataclasses
import os
import shutil
import socket

import pytest
import torch
import torch.multiprocessing as mp
from helpers import largest_difference, load
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

import data
import model
import train_grpo
from runtime.output import rank, world_size
from runtime.processes import gather_lists, gather_objects, init_processes
from tools.plan_memory import memory_plan

STEPS = 5
GROUP = 3
SETTINGS = [
    "model.max_pixels=3136",
    "data.train_size=6",
    "data.test_size=2",
    f"grpo.group_size={GROUP}",
    "grpo.micro_batch=1",
    "grpo.kl_coef=0.1",
    "grpo.drop_degenerate=true",
    "grpo.max_new_tokens=8",
    "grpo.lr=1e-3",
]


def random_rollouts(step, policy, examples):
    """All rollouts of a step: random completions and advantages, the same on every process.

    Step 2 has a single prompt, and in step 3 the groups of the second process are degenerate.
    """
    rollouts = []
    for i, example in enumerate(examples[:1] if step == 2 else examples):
        generator = torch.Generator().manual_seed(100 * step + i)
        lengths = torch.randint(1, 9, (GROUP,), generator=generator).tolist()
        tokens = [torch.randint(7, 500, (n,), generator=generator) for n in lengths]
        tokens = [ids.to(policy.device) for ids in tokens]
        sampled = [torch.zeros(n, device=policy.device) for n in lengths]
        rollout = model.Rollout(example, None, tokens, logprobs={"sampled": sampled})
        advantages = torch.randn(GROUP, generator=generator)
        if step == 3 and i % 2 == 1:
            advantages = torch.zeros(GROUP)
        rollout.advantages = advantages
        rollouts.append(rollout)
    return rollouts


def train(process, world, parallel, port, out, options, steps):
    """Some updates, then samples: what one process of `world` does."""
    os.environ |= {
        "RANK": str(process),
        "LOCAL_RANK": str(process),
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)
    init_processes()
    config = load(f"out={out}", *SETTINGS, f"model.parallel={parallel}", *options)
    grpo = config.grpo
    examples = data.load_split(config, "train")[:6]
    # Two views.
    examples[0] = dataclasses.replace(examples[0], images=examples[0].images * 2)
    policy, optimizer, state = model.resume(out, config, "tiny", grpo)
    reference = train_grpo.load_reference(policy, config, "tiny")
    assert policy.sharded == (parallel == "shard" and world > 1)
    train_grpo.preflight(policy, examples, config)

    norms = state.get("norms", [])
    for step in range(state["step"], steps):
        local = random_rollouts(step, policy, examples)[rank() :: world_size()]
        with policy.unsharded(), torch.no_grad():
            for rollout in local:
                rollout.prompt = policy.encode(rollout.example)
                # With a frozen tower, its output is cached here.
                policy.batch([rollout.prompt])
        with reference.without_adapters():
            train_grpo.record_logprobs(reference, local, "reference", grpo)
        update = train_grpo.update(policy, optimizer, local, 1e-3, grpo)
        loss = sum(gather_lists([s["loss"] for s in update.sums]))
        norms.append((loss, update.grad_norm))
    model.save_checkpoint(out, steps, policy, optimizer, norms=norms)
    if policy.sharded:
        check_plan(policy, optimizer, config)

    # Sampling needs nobody else: the first process has two prompts, the second one, others none.
    samples = []
    own = [examples[:2], examples[2:3]]
    with policy.unsharded():
        if rank() < len(own):
            samples = policy.sample(own[rank()], GROUP, 8, 1.0, (0, 1))
        if world_size() == 1:
            samples += policy.sample(own[1], GROUP, 8, 1.0, (0, 1))
    samples = gather_lists([[ids.tolist() for ids in r.tokens] for r in samples])
    if rank() == 0:
        torch.save({"samples": samples, "norms": norms}, out / "seen.pt")
    gather_objects(None)


def check_plan(policy, optimizer, config):
    """Weights and states are as large as planned, up to what does not divide evenly."""
    plan = memory_plan(policy, config, config.grpo)
    states = []
    for o in optimizer.optimizers:
        for state in o.state_dict()["state"].values():
            states += [s for s in state.values() if isinstance(s, DTensor)]
    for part, tensors in (("weights", policy.model.parameters()), ("optimizer", states)):
        size = sum(t.to_local().nbytes for t in tensors)
        assert size == pytest.approx(plan[part], rel=0.1)


def launch(folder, world, parallel, options=(), steps=STEPS):
    """Train on `world` processes: the final weights, and what else was seen."""
    folder.mkdir(exist_ok=True)
    if world == 1:
        threads = torch.get_num_threads()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "environ", dict(os.environ))
            train(0, 1, parallel, 0, folder, options, steps)
        torch.set_num_threads(threads)
    else:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        mp.spawn(train, (world, parallel, port, folder, options, steps), nprocs=world)
    return load_file(folder / "last" / "model.safetensors"), torch.load(folder / "seen.pt")


@pytest.fixture(autouse=True)
def not_on_one_gpu(request):
    if request.config.getoption("--device", "cpu") == "cuda" and torch.cuda.device_count() < 4:
        pytest.skip("several processes need a GPU each")


@pytest.mark.parametrize(
    ("options", "ways"),
    [
        (["grpo.freeze=[]"], ["replicate", "shard"]),
        (["model.gradient_checkpointing=true"], ["shard"]),
        (["grpo.lora_rank=4", "grpo.importance=sequence"], ["shard"]),
    ],
    ids=["everything", "frozen tower", "adapters"],
)
def test_however_weights_are_spread(tmp_path, options, ways):
    one, seen = launch(tmp_path / "one", 1, "replicate", options)
    for parallel in ways:
        two, same = launch(tmp_path / parallel, 2, parallel, options)
        assert largest_difference(one, two) <= 1e-5
        expected, found = (torch.tensor(s["norms"]) for s in (seen, same))
        assert torch.allclose(expected, found, rtol=1e-4, atol=1e-6)
        assert seen["samples"] == same["samples"]
    assert all(norm > 0 for _, norm in seen["norms"])
    start = model.load_policy(load()).model.state_dict()
    assert largest_difference(one, {name: start[name].cpu() for name in one}) > 1e-3


def test_saved_by_two_resumed_by_others(tmp_path):
    whole, _ = launch(tmp_path / "whole", 1, "replicate")
    launch(tmp_path / "parts", 2, "shard", steps=3)
    for world in (1, 4):
        folder = tmp_path / str(world)
        shutil.copytree(tmp_path / "parts", folder, symlinks=True)
        weights, _ = launch(folder, world, "shard")
        assert largest_difference(whole, weights) <= 1e-5
