"""Fixtures and options of all tests: the device, one thread, few phantoms, one tiny policy.

`pytest` runs on the CPU wherever it is started, `pytest --device cuda` on a GPU, and
`pytest --device cuda -m gpu` only the tests that use it in this process.

Nothing may import torch before pytest_configure has hidden the GPUs, so imports stand in functions.
"""

# ruff: noqa: PLC0415

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))


def pytest_addoption(parser):
    parser.addoption("--device", choices=["cpu", "cuda"], default="cpu", help="where models run")


def pytest_configure(config):
    """Hide the GPUs, also from the workers and scripts that are started from here."""
    cpu = config.getoption("device") == "cpu"
    if cpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    import torch

    # Faster for tiny models.
    torch.set_num_threads(1)
    # Convolutions would round to 10 bits.
    torch.backends.cudnn.allow_tf32 = False
    if not cpu and not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda: there is no GPU")


@pytest.fixture(scope="session")
def device(request):
    """Where the tensors of a test belong."""
    import torch

    return torch.device(request.config.getoption("device"))


@pytest.fixture(scope="session")
def several_processes(device):
    """For tests that start two or four processes."""
    import torch

    if device.type == "cuda" and torch.cuda.device_count() < 4:
        pytest.skip("nccl wants one GPU for each process")


@pytest.fixture(scope="session")
def config():
    from helpers import SMALL, load

    return load(*SMALL)


@pytest.fixture(scope="session")
def examples(config):
    import data

    return data.load_split(config, "train")


@pytest.fixture(scope="session")
def policy(config):
    """The built-in model, with every weight moved so that no part of it is idle.

    It is shared: tests set its attributes with monkeypatch, and train a copy.
    """
    from helpers import move_weights

    from model import load_policy

    return move_weights(load_policy(config), 0.05, seed=1)
