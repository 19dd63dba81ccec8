"""Weights replicated or sharded over processes give what one process gives, whatever each of them
has to do: one of the steps has a single prompt, in another all groups of one process are dropped.
"""

import atexit
import builtins
import dataclasses
import os
import shutil
import socket
import sys
import time
from contextlib import suppress

import pytest
import torch
import torch.multiprocessing as mp
from helpers import START, all_tokens, largest_difference, load, tolerance, weights
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

import data
import train_grpo
from model import Rollout, load_or_resume, save_checkpoint
from runtime.config import InputError
from runtime.output import rank, world_size
from runtime.processes import end_processes, gather_lists, gather_objects, init_processes, run_main
from tools.plan_memory import memory_plan

pytestmark = pytest.mark.usefixtures("several_processes")

STEPS = 5
SETTINGS = [
    f"model.path={START}",
    "model.max_pixels=3136",
    "data.train_size=6",
    "data.test_size=2",
    "grpo.group_size=3",
    "grpo.micro_tokens=1",
    "grpo.kl_coef=0.1",
    "grpo.drop_degenerate=true",
    "grpo.max_new_tokens=8",
    "grpo.lr=1e-3",
]


def random_rollout(step, i, example, policy, group_size):
    """Random completions and advantages of prompt i, the same on every process."""
    generator = torch.Generator().manual_seed(100 * step + i)
    lengths = torch.randint(1, 9, (group_size,), generator=generator).tolist()
    tokens = [torch.randint(7, 500, (n,), generator=generator) for n in lengths]
    advantages = torch.randn(group_size, generator=generator)
    if step == 3 and i % 2 == 1:
        # All groups of the second of two processes.
        advantages = torch.zeros(group_size)
    tokens = [ids.to(policy.device) for ids in tokens]
    sampled = [torch.zeros(n, device=policy.device) for n in lengths]
    return Rollout(
        example,
        policy.encode(example),
        tokens,
        logprobs={"sampled": sampled},
        advantages=advantages,
    )


@torch.no_grad()
def local_rollouts(step, policy, examples, group_size):
    """This process's share of the prompts of a step. Step 2 has a single one."""
    chosen = list(enumerate(examples[:1] if step == 2 else examples))
    rollouts = [
        random_rollout(step, i, example, policy, group_size)
        for i, example in chosen[rank() :: world_size()]
    ]
    with policy.unsharded():
        for r in rollouts:
            # Keeps the features of a frozen vision tower, as sampling does.
            policy.remember_images([r.prompt])
    return rollouts


def sample_apart(policy, examples):
    """The first process has two prompts, the second one, others none: nobody waits."""
    shares = [examples[:2], examples[2:3]]
    share = shares[rank()] if rank() < 2 else []
    if world_size() == 1:
        share = examples[:3]
    with policy.unsharded():
        rollouts = policy.sample(share, 3, 8, 1.0, (0, 1))
    return gather_lists([ids.tolist() for ids in all_tokens(rollouts)])


def local_bytes(policy, optimizer):
    """What this process holds of sharded weights and optimiser states."""
    found = {"weights": 0, "optimizer": 0}
    for p in policy.model.parameters():
        found["weights"] += p.to_local().nbytes
    for one in optimizer.optimizers:
        for state in one.state_dict()["state"].values():
            for value in state.values():
                if isinstance(value, DTensor):
                    found["optimizer"] += value.to_local().nbytes
    return found


def train(out, parallel, options, steps):
    """Updates on given rollouts, from the last checkpoint in `out`, and then some samples."""
    config = load(f"out={out}", f"model.parallel={parallel}", *SETTINGS, *options)
    grpo = config.grpo
    examples = data.load_split(config, "train")[:6]
    # Two views. Not of the first: what runs along without work must not be just any prompt.
    examples[1] = dataclasses.replace(examples[1], images=examples[1].images * 2)
    policy, optimizer, state = load_or_resume(out, config, str(START), grpo)
    reference = train_grpo.load_reference(policy, config, str(START))
    assert policy.sharded == (parallel == "shard" and world_size() > 1)
    train_grpo.preflight(policy, examples, config, {"step": 0})
    norms = state.get("norms", [])
    for step in range(state["step"], steps):
        rollouts = local_rollouts(step, policy, examples, grpo.group_size)
        with reference.without_adapters():
            train_grpo.record_logprobs(reference, rollouts, "reference", grpo)
        result = train_grpo.update(policy, optimizer, rollouts, grpo)
        losses = gather_lists([part["loss"] for part in result.sums])
        norms.append((sum(losses), result.grad_norm))
    save_checkpoint(out, steps, policy, optimizer, norms=norms)

    seen = {"norms": norms, "samples": sample_apart(policy, examples)}
    if policy.sharded:
        seen["bytes"] = local_bytes(policy, optimizer)
        seen["planned bytes"] = memory_plan(policy, config, grpo, world_size())
    if rank() == 0:
        torch.save(seen, out / "seen.pt")
    gather_objects(None)


def process(local_rank, world, port, work, *args):
    """One of several processes, as torchrun starts them."""
    os.environ |= {
        "RANK": str(local_rank),
        "LOCAL_RANK": str(local_rank),
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)
    init_processes()
    work(*args)
    end_processes()


def leave_work_to_a_thread():
    """A thread of the first process gets its sum, and frees the tensor, while Python shuts down."""
    if rank() == 1:
        time.sleep(0.5)
        with suppress(RuntimeError):
            torch.distributed.all_reduce(torch.ones(1))
        return
    # What the caches of FSDP2 do.
    builtins.kept = torch.distributed.group.WORLD
    sys.setswitchinterval(100)
    atexit.register(count_for_a_second)
    torch.distributed.all_reduce(torch.ones(1), async_op=True)


def count_for_a_second():
    """The thread asks for the interpreter meanwhile, and does not get it."""
    end = time.perf_counter() + 1
    while time.perf_counter() < end:
        pass


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def launch(folder, world, parallel, options=(), steps=STEPS):
    """Train on so many processes: the weights, and what else was seen."""
    folder.mkdir(exist_ok=True)
    args = (folder, parallel, options, steps)
    if world == 1:
        train(*args)
    else:
        mp.spawn(process, (world, free_port(), train, *args), nprocs=world)
    return weights(folder), torch.load(folder / "seen.pt")


@pytest.mark.parametrize(
    ("options", "ways"),
    [
        (["grpo.freeze=[]"], ["replicate", "shard"]),
        (["model.gradient_checkpointing=true"], ["shard"]),
        (["grpo.lora_rank=4", "grpo.importance=sequence"], ["shard"]),
    ],
    ids=["everything", "frozen tower", "adapters"],
)
def test_however_weights_are_spread(tmp_path, device, options, ways):
    one, seen = launch(tmp_path / "one", 1, "replicate", options)
    assert largest_difference(one, load_file(START / "model.safetensors")) > 1e-3
    norms = torch.tensor(seen["norms"])
    assert (norms[:, 1] > 0).all()
    limit = tolerance("gradients", device)
    for parallel in ways:
        two, other = launch(tmp_path / parallel, 2, parallel, options)
        assert largest_difference(one, two) <= limit
        assert torch.allclose(norms, torch.tensor(other["norms"]), rtol=1e-4, atol=1e-6)
        assert seen["samples"] == other["samples"]
    # As planned, except for what does not divide evenly.
    for part, size in other["bytes"].items():
        assert size == pytest.approx(other["planned bytes"][part], rel=0.1), part


def test_saved_by_two_resumed_by_others(tmp_path, device):
    whole, _ = launch(tmp_path / "whole", 1, "replicate")
    launch(tmp_path / "parts", 2, "shard", steps=3)
    for world in (1, 4):
        folder = tmp_path / str(world)
        shutil.copytree(tmp_path / "parts", folder, symlinks=True)
        resumed, _ = launch(folder, world, "shard")
        assert largest_difference(whole, resumed) <= tolerance("gradients", device)


def test_threads_at_work_do_not_abort_a_finished_run(device):
    if device.type == "cuda":
        pytest.skip("only gloo has such threads")
    mp.spawn(process, (2, free_port(), leave_work_to_a_thread), nprocs=2)


def fail():
    """One process stops with an error, and the other waits for it."""

    def main():
        if rank() == 1:
            raise InputError("no such file")
        gather_objects(None)

    run_main(main)


def test_an_error_in_one_process_has_status_1():
    with pytest.raises(mp.ProcessExitedException) as ended:
        mp.spawn(process, (2, free_port(), fail), nprocs=2)
    assert ended.value.exit_code == 1
