"""Past one device: four gloo processes on a CPU, whose results must be those of one. The checks are in _ranks.py."""

from __future__ import annotations

import gc
import json
import os
import socket
import subprocess
import sys
import time
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import tip_kernels as tip
from tests import _ranks
from tests._cases import head_case
from tip_kernels.distillation.distill import Batch
from tip_kernels.sources.pair import Request


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


def test_a_global_quota_learns_from_the_kept_rows_alone_on_a_gpu_too():
    """Its capacity is every row of the rank, which would then all be projected again."""
    head = head_case(10, 20, 4, seed=1).head
    batch = Batch(Request.checked(head, head))
    ids = torch.tensor([1, 4])
    on_gpu = SimpleNamespace(mask=SimpleNamespace(device=torch.device("cuda")), row_ids=ids, slots=lambda most: most)
    assert batch.slots(on_gpu, tip.SoftOr(0.2, scope="rollout")) == 2  # as many as may be, without waiting
    found, valid = batch.slots(on_gpu, tip.SoftOr(0.2, scope="global"))
    assert found is ids and valid.all()


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


def test_no_graph_keeps_a_process_group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        group = dist.new_group([0])
        losses = _ranks.vocabulary_parallel_losses(group)
        losses[1].loss.backward()  # resolved when it runs
        end = weakref.ref(group)
        dist.destroy_process_group(group)
        del group
        assert end() is None, gc.get_referrers(end())
        with pytest.raises(RuntimeError, match="vocab_group until the last backward"):
            losses[0].loss.backward()
    finally:
        dist.destroy_process_group()


def test_twenty_runs_that_end_with_a_loss_at_hand_end_with_code_0(tmp_path):
    """torch aborts, now and then, a process at whose exit a group is left."""
    run = [sys.executable, "-c", f"from tests import _ranks; _ranks.end_runs({str(tmp_path)!r}, 20)"]
    done = subprocess.run(
        run, capture_output=True, text=True, env=alone() | {"PYTHONPATH": str(Path(__file__).parents[1])}
    )
    assert done.returncode == 0, done.stderr[-2000:]
    # torch 2.10's gloo writes to stdout, too
    assert json.loads(done.stdout.splitlines()[-1]) == [0] * 40, done.stderr[-2000:]


JOB = ["-m", "tip_kernels", "opd", "--device", "cpu", "--quiet", "--no-report"]
LAUNCHERS = {
    "torchrun": ["-m", "torch.distributed.run", "--nproc-per-node", "2"],
    "accelerate launch": ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
                          "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"],
}  # fmt: skip


def log_of(folder: Path) -> list[dict]:
    log = folder / "log.jsonl"
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def run_job(launched: list[str], folder: Path, *options: str) -> dict:
    """The job's result, of which there must be one."""
    command = [sys.executable, *launched, *JOB, "--output", str(folder), "--json", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=alone())
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("{") == 1, "more than one rank printed its result"
    return json.loads(done.stdout.splitlines()[-1])


def test_the_main_job_on_two_ranks_reaches_the_accuracy_of_one(tmp_path):
    pytest.importorskip("transformers")
    options = ["--batch", "64", "--steps", "10", "--eval-prompts", "64"]
    one = run_job([], tmp_path / "one", *options)
    two = run_job(LAUNCHERS["torchrun"], tmp_path / "two", *options)
    assert [row["step"] for row in log_of(tmp_path / "two")] == list(range(11))
    for row_one, row_two in zip(log_of(tmp_path / "one")[1:], log_of(tmp_path / "two")[1:], strict=True):
        assert abs(row_two["rows"] / row_one["rows"] - 1) < 0.1  # as many rollouts in all
    assert two["start_accuracy"] == one["start_accuracy"] < 0.6
    assert one["end_accuracy"] > 0.9 and two["end_accuracy"] > 0.9


def test_the_main_job_runs_under_accelerate_launch_with_a_global_quota(tmp_path):
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    options = ["--batch", "7", "--steps", "2", "--eval-prompts", "5", "--scope", "global", "--rule", "sample_entropy"]
    run_job(LAUNCHERS["accelerate launch"], tmp_path / "two", *options)
    for row in log_of(tmp_path / "two")[1:]:
        assert 0.2 * row["rows"] - 7 < row["kept"] <= 0.2 * row["rows"]  # each of 7 rollouts has a quota of its own


def test_the_main_job_ends_when_a_rank_is_killed(tmp_path):
    pytest.importorskip("transformers")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    command = [sys.executable, *JOB, "--steps", "9999", "--eval-prompts", "2", "--batch", "4"]
    command += ["--timeout", "20", "--output", str(tmp_path / "run")]
    ranks = [
        subprocess.Popen(
            [*command, "--timeout", "20"],
            stderr=subprocess.PIPE,
            text=True,
            env=alone() | address | {"RANK": str(rank)},
        )
        for rank in (0, 1)
    ]
    try:
        until = time.monotonic() + 60
        while len(log_of(tmp_path / "run")) < 3 and time.monotonic() < until:
            time.sleep(0.1)
        ranks[1].kill()
        start = time.monotonic()
        said = ranks[0].communicate(timeout=60)[1]
    finally:
        for process in ranks:
            process.kill()
            process.communicate()
    assert ranks[0].returncode not in (0, None)
    assert "RuntimeError: tip_kernels: rank 0 of 2 could not" in said, said
    assert time.monotonic() - start < 30


def alone() -> dict[str, str]:
    """The environment without what a launcher may have put there."""
    return {name: value for name, value in os.environ.items() if name not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
