"""Without a GPU, Triton kernels run through the interpreter, which must be asked for before triton is imported."""

import os

import pytest
import torch

from tests._interpreter import fuse_multiply_adds

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
    fuse_multiply_adds()
torch.set_num_threads(1)  # the tests' matrices are small, and pytest runs on several processes

SHARDS = {False: (4, 75), True: (40, 250)}  # shards and cases of each, by --long


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="10,000 random cases in test_properties.py instead of 300")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "shard" in metafunc.fixturenames:
        shards, cases = SHARDS[metafunc.config.getoption("--long")]
        metafunc.parametrize("shard", [(seed, cases) for seed in range(shards)], ids=lambda shard: f"seed {shard[0]}")
