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


@pytest.mark.parametrize("way", ["killed", "stopped"])
def test_a_rank_that_is_gone_is_an_error_on_the_others_and_no_hang(way, tmp_path):
    """Killed, it breaks the connection; stopped, it lets the time-out of 3 s pass."""
    context = mp.get_context("spawn")
    ranks = [context.Process(target=_ranks.lose_a_rank, args=(rank, way, str(tmp_path))) for rank in (0, 1)]
    for process in ranks:
        process.start()
    ranks[0].join(60)
    alive = ranks[0].is_alive()
    for process in ranks:
        process.kill()
        process.join()
    assert not alive, "the rank that was left hangs"
    said, seconds = json.loads((tmp_path / "said.json").read_text())
    assert said.startswith("tip_kernels: rank 0 of 2 could not gather"), said
    assert "another rank died" in said
    assert seconds < 10, f"took {seconds:.0f} s"
