"""Past one device: four gloo processes on a CPU, whose results must be those of one. The checks are in _ranks.py."""

from __future__ import annotations

import json
from pathlib import Path

import _ranks
import pytest
import torch.multiprocessing as mp


@pytest.fixture(scope="module")
def failures(tmp_path_factory) -> dict[str, str]:
    """What failed, by check, on the first rank where it did: all checks are made in one go of four processes."""
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(_ranks.run_all, (str(folder), list(_ranks.CHECKS)), nprocs=_ranks.RANKS)
    found = {}
    for rank in reversed(range(_ranks.RANKS)):
        for name, text in json.loads(Path(folder, f"{rank}.json").read_text()).items():
            found[name] = f"rank {rank}:\n{text}"
    return found


@pytest.mark.parametrize("name", _ranks.CHECKS)
def test_ranks(name, failures):
    assert name not in failures, failures[name]
