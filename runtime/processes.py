"""Ranks, collectives, sharded weights, signals, and how a script starts and ends.

A function whose docstring says "Collective" must be called by all processes equally often: each
waits for the others. Without torchrun there is one process, and nothing waits.
"""

import argparse
import errno
import itertools
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from runtime.config import Config, InputError, config_text, load_config
from runtime.output import print0, rank, world_size

SIGNALS = (signal.SIGINT, signal.SIGTERM)

# ------------------------------------------------------------------------------- ranks


def init_processes():
    """Join the other processes that torchrun started, if any."""
    if world_size() == 1 or dist.is_initialized():
        return
    backend = "gloo"
    if torch.cuda.is_available():
        backend = "nccl"
        local_rank = int(os.environ["LOCAL_RANK"])
        count = torch.cuda.device_count()
        if local_rank >= count:
            raise InputError(f"--nproc_per_node is more than the {count} GPUs of this machine")
        torch.cuda.set_device(local_rank)
    dist.init_process_group(backend, timeout=timedelta(hours=2))


def gather_objects(value: Any) -> list:
    """[value of rank 0, value of rank 1, ..]. Collective."""
    values = [value] * world_size()
    if not dist.is_initialized():
        return values
    try:
        dist.all_gather_object(values, value)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"another process has stopped, see its message ({reason})") from None
    return values


def gather_lists(items: list) -> list:
    """The lists of all processes joined, rank 0 first. Collective."""
    return list(itertools.chain.from_iterable(gather_objects(items)))


def gather_rows(rows: list) -> tuple[list, slice]:
    """The lists of all processes joined, and which slice of it is ours. Collective."""
    counts = gather_objects(len(rows))
    first = sum(counts[: rank()])
    return gather_lists(rows), slice(first, first + len(rows))


def end_processes(status: int = 0):
    """End this process at once, if others ran beside it: nothing after this call runs then."""
    if not dist.is_initialized():
        return
    if status == 0:
        # Else a process that ends early can take the others with it.
        dist.destroy_process_group()
    # Caches of FSDP2 keep gloo's threads alive. One that frees a tensor while Python shuts down
    # aborts the process (before Python 3.14), so Python does not shut down.
    sys.stdout.flush()
    os._exit(status)


# ------------------------------------------------------------------------------- sharded weights


def shard_weights(model: nn.Module, blocks: list[nn.Module], dtype: torch.dtype | None):
    """Spread float32 weights, and with them gradients and optimiser states, over the processes.

    FSDP2 (Zhao et al. 2023) gathers one block at a time, in `dtype` for its forward, and sums
    gradients in float32. Embedding and head stay in float32.
    """
    options = {"reduce_dtype": torch.float32, "cast_forward_inputs": False}
    for block in reversed(blocks):
        fully_shard(block, mp_policy=MixedPrecisionPolicy(param_dtype=dtype, **options))
    fully_shard(model, mp_policy=MixedPrecisionPolicy(**options))

    # While the backward of a block runs, FSDP2 gathers the weights of the one before it. By default
    # it takes the order of past forwards, but each process has sampled in an order of its own, and
    # would wait for a block that others do not gather. So we state the order: within the tower or
    # the language model the block before, and nothing ahead (the block itself) at their ends.
    for before, module in zip([model, *blocks], [*blocks, model]):
        same_stack = type(before) is type(module)
        module.set_modules_to_backward_prefetch([before if same_stack else module])

    # FSDP2 gathers the root's weights only in a registered forward method: this one runs anything.
    model.run_in_forward = lambda work: work()
    register_fsdp_forward_method(model, "run_in_forward")

    # Losses are shares of one global mean, so gradients are summed and not averaged.
    for module in fsdp_modules(model):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)


def fsdp_modules(model):
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


@contextmanager
def unsharded(model: nn.Module) -> Iterator[None]:
    """Whole weights on every process. Collective at the start and at the end only.

    In between, what runs without gradients needs no other process: each can sample and score as
    many rows as it has. No effect on weights that are not sharded.
    """
    modules = fsdp_modules(model)
    if not modules:
        yield
        return
    model.set_reshard_after_forward(False)
    model.run_in_forward(lambda: None)  # the root first
    for module in modules:
        module.unshard()
    yield
    for module in modules:
        module.reshard()
    model.set_reshard_after_forward(True)
    # The backward begins with the root.
    model.set_reshard_after_forward(False, recurse=False)


def whole_tensor(tensor: Any) -> Any:
    """A sharded tensor, whole on the first process, None on the others. Collective."""
    if not isinstance(tensor, DTensor):
        return tensor
    tensor = tensor.full_tensor()
    return tensor.cpu() if rank() == 0 else None


def shard_state(state: dict, optimizer: Optimizer) -> dict:
    """The saved state of an optimizer, whole tensors, sharded as its parameters are."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for i, values in state["state"].items():
        p = parameters[i]
        if not isinstance(p, DTensor):
            continue
        for name, value in values.items():
            # Step counters are not sharded.
            if value.shape == p.shape:
                value = value.to(p.device)
                values[name] = distribute_tensor(value, p.device_mesh, p.placements)
    return state


def sum_gradients(parameters: list[Tensor]):
    """Sum the gradients over the processes. Sharded ones are summed already. Collective."""
    for p in parameters:
        # A process without tokens still takes part.
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    gradients = [p.grad for p in parameters if not isinstance(p, DTensor)]
    if world_size() == 1 or not gradients:
        return
    # All in one message: hundreds of small ones would wait for each other.
    flat = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(flat)
    sizes = [g.numel() for g in gradients]
    for gradient, total in zip(gradients, flat.split(sizes)):
        gradient.copy_(total.view_as(gradient))


# ------------------------------------------------------------------------------- signals


class StopRequest:
    """SIGTERM or Ctrl-C asks to stop after the current step.

    A second one ends the process at once. Not so under torchrun, which passes the first signal on
    several times; it kills what has not ended 30 seconds later, and a longer step is lost.
    """

    def __init__(self):
        self.received = False
        on_signals(self.receive)

    def receive(self, number, _):
        self.received = True
        if not dist.is_torchelastic_launched():
            signal.signal(number, signal.SIG_DFL)

    def requested(self) -> bool:
        """Was any process asked? Collective."""
        return any(gather_objects(self.received))

    def release(self):
        """From here on nothing is left to be saved, so a signal ends the process at once."""

        def leave(*_):
            if rank() == 0:
                os.write(1, b"\nstopped while evaluating; the same command evaluates again\n")
            os._exit(0)

        on_signals(leave)

    def finish(self):
        """On the way out there is nothing to stop. Python would restore the default handlers."""
        on_signals(signal.SIG_IGN)


def on_signals(action):
    """Take this action when SIGTERM or Ctrl-C comes."""
    for number in SIGNALS:
        signal.signal(number, action)


# ------------------------------------------------------------------------------- scripts


def argument_parser(usage: str) -> argparse.ArgumentParser:
    """A parser whose --help shows the docstring of a program as it stands."""
    layout = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(description=usage, formatter_class=layout)


def parse_args(usage: str, **options: dict) -> tuple[Config, argparse.Namespace]:
    """Read the command line `CONFIG [key=value ..]` and the configuration that it names.

    options: further arguments, with the keyword arguments of add_argument.
    """
    parser = argument_parser(usage)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    for name, settings in options.items():
        parser.add_argument(f"--{name}", **settings)
    # An option of several words would take the overrides that follow it, so they are read first.
    words = sys.argv[1:]
    overrides = [word for word in words if is_override(word)]
    args = parser.parse_args([word for word in words if word not in overrides])
    return load_config(args.config, args.overrides + overrides), args


def is_override(word):
    return "=" in word and not word.startswith("-") and not os.path.exists(word)


def start_training(usage: str) -> tuple[Config, StopRequest]:
    """Read the command line, join the other processes, print the configuration."""
    config, _ = parse_args(usage)
    init_processes()
    stop = StopRequest()
    print0(config_text(config))
    return config, stop


def run_main(main: Callable[[], None]):
    """Run a script's main(). An InputError becomes one line on stderr and exit status 1."""
    try:
        main()
    except InputError as error:
        leave(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        leave(f"error: {error.strerror}; make room and start the same command again")
    end_processes()


def leave(message):
    """Print one line and exit."""
    print(message, file=sys.stderr, flush=True)
    end_processes(1)
    sys.exit(1)
