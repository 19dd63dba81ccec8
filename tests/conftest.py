"""Shared by all tests: the modules on the path, one thread (faster for tiny models), one tiny policy."""

import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)

import data  # noqa: E402
import model  # noqa: E402

SMALL = ["data.train_size=40", "data.val_size=6", "data.test_size=8", "model.max_pixels=9216"]


@pytest.fixture(scope="session")
def config():
    return data.load_config(ROOT / "config.yaml", SMALL)


@pytest.fixture(scope="session")
def examples(config):
    return data.load_split(config, "train")


@pytest.fixture(scope="session")
def policy(config):
    """The built-in model with every weight moved away from its initial value, so that no part of it is idle."""
    policy = model.load_policy(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in policy.model.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=generator))
    return policy
