"""Weights replicated or sharded over processes give what one process gives, whatever each of them has to do."""

import dataclasses
import os
import shutil
import socket

import pytest
import torch
import torch.multiprocessing as mp
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

import data
import model
import train_grpo
from conftest import ROOT

STEPS = 5


def rollouts_of(step, policy, examples, group_size):
    """The global batch of a step: random completions and advantages, the same on every process. Step 2 has a single prompt."""
    rollouts = []
    for i, example in enumerate(examples[:1] if step == 2 else examples):
        g = torch.Generator().manual_seed(100 * step + i)
        lengths = torch.randint(1, 9, (group_size,), generator=g).tolist()
        tokens = [torch.randint(7, 500, (n,), generator=g) for n in lengths]
        rollouts.append(
            model.Rollout(
                example,
                None,
                tokens,
                [torch.zeros(n) for n in lengths],
                [""] * group_size,
                [True] * group_size,
            )
        )
        rollouts[-1].advantages = torch.randn(group_size, generator=g) * (
            i % 2 == 0 or step != 3
        )  # step 3: rank 1's are degenerate
    return rollouts


def train(rank, world, parallel, port, out, options, steps):
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)
    model.setup()
    config = data.load_config(
        ROOT / "config.yaml",
        [
            f"out={out}",
            "model.max_pixels=3136",
            "data.train_size=6",
            "data.test_size=2",
            "grpo.group_size=3",
            "grpo.micro_batch=1",
            "grpo.kl_coef=0.1",
            "grpo.drop_degenerate=true",
            "grpo.max_new_tokens=8",
            "grpo.lr=1e-3",
            f"model.parallel={parallel}",
            *options,
        ],
    )
    grpo = config.grpo
    examples = data.load_split(config, "train")[:6]
    examples[0] = dataclasses.replace(examples[0], images=examples[0].images * 2)  # two views
    policy, optimizers, state = model.resume(out, config, None, grpo)
    reference = policy
    if not grpo.lora_rank:
        reference = model.load_policy(config)
        if policy.sharded:
            reference.shard()
    assert policy.sharded == (parallel == "shard" and world > 1)
    train_grpo.preflight(policy, examples, config)
    norms = state.get("norms", [])
    for step in range(state["step"], steps):
        mine = rollouts_of(step, policy, examples, grpo.group_size)[rank::world]
        with policy.gathered(), torch.no_grad():
            for r in mine:
                r.prompt = policy.encode(r.example)
                policy.frozen_features([r.prompt])
        with reference.without_adapters():
            for r, logp in zip(mine, train_grpo.fixed_logprobs(reference, mine, grpo)):
                r.ref_logprobs = logp
        sums, norm = train_grpo.update(policy, optimizers, mine, 1e-3, grpo)
        norms.append((sum(model.gather_objects(sums["loss"])), norm))
    model.save_checkpoint(out, steps, policy, optimizers, norms=norms)
    if policy.sharded:  # as planned, but for what does not divide evenly
        plan = model.memory_plan(policy, config, grpo)
        states = [
            s
            for o in optimizers
            for state in o.state_dict()["state"].values()
            for s in state.values()
            if isinstance(s, DTensor)
        ]
        for part, tensors in (("weights", policy.model.parameters()), ("optimizer", states)):
            assert sum(t.to_local().nbytes for t in tensors) == pytest.approx(plan[part], rel=0.1)
    # Sampling needs nobody else: the first process has two prompts, the second one, others none.
    with policy.gathered():
        samples = [
            r
            for i, some in enumerate([examples[:2], examples[2:3]])
            if i % world == rank
            for r in policy.sample(some, 3, 8, 1.0, (0, 1))
        ]
    samples = sum(model.gather_objects([[t.tolist() for t in r.tokens] for r in samples]), [])
    if rank == 0:
        torch.save({"samples": samples, "norms": norms}, out / "seen.pt")
    model.gather_objects(None)


def launch(folder, world, parallel, options=(), steps=STEPS):
    """Trains on so many processes; the weights and what else was seen."""
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


def distance(a, b):
    assert a.keys() == b.keys()
    return max(float((a[n] - b[n]).abs().max()) for n in a)


@pytest.mark.parametrize(
    "options, ways",
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
        assert distance(one, two) <= 1e-5
        assert torch.allclose(
            torch.tensor(seen["norms"]), torch.tensor(same["norms"]), rtol=1e-4, atol=1e-6
        )
        assert seen["samples"] == same["samples"]
    start = model.load_policy(data.load_config(ROOT / "config.yaml")).model.state_dict()
    assert distance(one, {name: start[name] for name in one}) > 1e-3


def test_saved_by_two_resumed_by_others(tmp_path):
    whole, _ = launch(tmp_path / "whole", 1, "replicate")
    launch(tmp_path / "parts", 2, "shard", steps=3)
    for world in (1, 4):
        shutil.copytree(tmp_path / "parts", tmp_path / str(world), symlinks=True)
        assert distance(whole, launch(tmp_path / str(world), world, "shard")[0]) <= 1e-5
