"""What the processes of test_parallel.py run: checks that every rank of a gloo group makes, against one process.

A check is a function of a group of P ranks; it raises where something is wrong. Every check gets groups of its own, so
that one that fails on some rank leaves the others' collectives alone.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import struct
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch import Tensor

import tip_kernels as tip
from tests._cases import (
    EVERY_FIELD,
    HEADS,
    INF,
    NAN,
    PAIRS,
    distill,
    head_case,
    labels_for,
    leaf,
    normal,
    relative_error,
)
from tests._interpreter import fuse_multiply_adds
from tip_kernels.plan import wire
from tip_kernels.sources.pair import HeadBlock
from tip_kernels.stats import STATISTICS

RANKS = 4
BANNED = -(2.0**101)  # a logit so low is banned, and times 0 it is 0
CHECKS: dict[str, tuple[Callable, int]] = {}  # name: the check and its P


def check(*sizes: int) -> Callable:
    def register(function: Callable) -> Callable:
        CHECKS.update({f"{function.__name__}[{size}]": (function, size) for size in sizes})
        return function

    return register


def run_all(rank: int, folder: str, names: list[str]) -> None:
    """Makes the checks called names, and writes what failed on this rank."""
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["TRITON_INTERPRET"] = "1"
    fuse_multiply_adds()
    torch.set_num_threads(1)
    torch.set_warn_always(False)
    rendezvous = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", rendezvous, timedelta(seconds=20), RANKS, rank)
    failures = {}
    for name in names:
        function, size = CHECKS[name]
        groups = [dist.new_group(range(i, i + size), timeout=timedelta(seconds=20)) for i in range(0, RANKS, size)]
        try:
            function(groups[rank // size])
        except Exception:
            failures[name] = traceback.format_exc()
    Path(folder, f"{rank}.json").write_text(json.dumps(failures))
    dist.barrier()
    dist.destroy_process_group()


# ---- vocabulary-parallel


def bounds(size: int, rows: int, padded: bool = False) -> list[int]:
    """Uneven shards; of four ranks the second has nothing, and where padded the last has padding only."""
    return [0, rows * 2 // 3, rows] if size == 2 else [0, rows // 4, rows // 4, rows * 9 // 10, rows]


def shard(group: dist.ProcessGroup, x: Tensor | None, cuts: list[int] | None = None) -> Tensor | None:
    """This rank's rows of x."""
    if x is None:
        return None
    rank, cuts = dist.get_rank(group), cuts or bounds(group.size(), x.shape[0])
    return x.detach()[cuts[rank] : cuts[rank + 1]].clone()


def parts(group: dist.ProcessGroup, head: tip.Head) -> tip.Head:
    """The same head, of which this rank has a shard."""
    weight, bias = shard(group, head.weight), shard(group, head.bias)
    if head.weight.requires_grad:
        weight, bias = leaf(weight), None if bias is None else leaf(bias)
    options = {"scale": head.scale, "softcap": head.softcap, "vocab_size": head.vocab_size, "vocab_group": group}
    return tip.Head(leaf(head.hidden) if head.hidden.requires_grad else head.hidden, weight, bias, **options)


def head_of_logits(z: Tensor) -> tip.Head:
    """A head whose logits are z: the identity times z."""
    return tip.Head(torch.eye(z.shape[0]), z.t().masked_fill(z.t() == -INF, BANNED).contiguous())


def fields_of(stats: tip.TokenStats) -> dict[str, Tensor]:
    return {name: x for name in STATISTICS if (x := stats._get(name)) is not None}


def same_on_all_ranks(group: dist.ProcessGroup, what: str, x: Tensor) -> None:
    every = [torch.empty_like(x) for _ in range(group.size())]
    dist.all_gather(every, x.contiguous(), group=group)
    for other in every:
        torch.testing.assert_close(other, x, rtol=0, atol=0, equal_nan=True, msg=lambda text: f"{what}: {text}")


def close(what: str, ours: Tensor, one: Tensor, floor: float = 2e-6) -> None:
    """Equal within fp32 rounding to one process."""
    if ours.is_floating_point():
        torch.testing.assert_close(ours, one, rtol=2e-6, atol=floor, equal_nan=True, msg=lambda text: f"{what}: {text}")
    else:
        assert torch.equal(ours, one), f"{what}: {ours.tolist()} instead of {one.tolist()}"


@check(2, 4)
def vocabulary_parallel_statistics_equal_one_process(group):
    n, v = 24, 150
    labels = labels_for(n, v)
    for temperature in (1.0, torch.linspace(0.5, 2.0, n)):
        for name, pair in PAIRS.items():
            z_s, z_t = pair(n, v)
            heads = head_of_logits(z_s), head_of_logits(z_t)
            asked = {"labels": labels, "temperature": temperature, **EVERY_FIELD}
            one = tip.token_stats(*heads, **asked)
            ours = tip.token_stats(parts(group, heads[0]), parts(group, heads[1]), **asked, workspace_mib=1)
            for field, value in fields_of(one).items():
                close(f"{name}, {field}", getattr(ours, field), value)
                same_on_all_ranks(group, f"{name}, {field}", getattr(ours, field))


@check(2, 4)
def the_gather_of_a_block_is_under_way_while_the_next_one_is_projected(group):
    """Three blocks of 256 rows on a CPU; the statistics are those of one process, whose blocks are the same."""
    n, v = 600, 90
    student, teacher = head_case(n, v, 8, seed=1).head, head_case(n, v, 8, seed=2).head
    asked = {"labels": labels_for(n, v), "temperature": torch.linspace(0.5, 2.0, n), **EVERY_FIELD}
    one, heads, seen = tip.token_stats(student, teacher, **asked), [parts(group, student), parts(group, teacher)], []
    all_gather, tile = dist.all_gather, HeadBlock.tile

    def begun(*args, **options):
        work = all_gather(*args, **options)
        seen.append("begun")
        return SimpleNamespace(wait=lambda: (seen.append("waited for"), work.wait()))

    def projected(block, *args):
        seen.append("projected") if seen[-1] != "projected" else None
        return tile(block, *args)

    dist.all_gather, HeadBlock.tile = begun, projected
    try:
        ours = tip.token_stats(*heads, **asked)
    finally:
        dist.all_gather, HeadBlock.tile = all_gather, tile
    first, block, last = ["begun", "waited for"] * 2, ["projected", "begun"], ["waited for"]
    assert seen == first + block + 2 * (block + last) + last, seen
    for field, value in fields_of(one).items():
        close(field, getattr(ours, field), value)
        same_on_all_ranks(group, field, getattr(ours, field))


def losses() -> dict[str, tuple[tip.Divergence, float]]:
    """Divergences of both classes, clipped and mixed, with a weight of the label loss."""
    return {
        "forward": (tip.ForwardKL(), 0.0),
        "reverse and labels": (tip.ReverseKL(), 0.3),
        "blend": (tip.Renyi(0.5) + 0.5 * tip.AlphaBeta(0.2, 0.7), 0.0),
        "hellinger, clipped": (tip.HellingerSq().clipped(0.5), 0.2),
        "jsd": (tip.JSD(0.3), 0.0),
        "skew, tvd, todi": (tip.SkewForwardKL(0.1) + tip.SkewReverseKL(0.1) + tip.TVD() + tip.ToDi(), 0.1),
        "sampled": (tip.SampledReverseKL(), 0.0),
    }


def gradients(head: tip.Head) -> list[Tensor]:
    return [x.grad for x in (head.hidden, head.weight, head.bias) if x is not None]


@check(2, 4)
def vocabulary_parallel_gradients_equal_one_process(group):
    n, v = 20, 1300
    labels = labels_for(n, 1100)
    mask = torch.arange(n) % 7 != 2
    everything = losses()
    for i, (name, options) in enumerate(HEADS.items()):
        case = head_case(n, v, 16, seed=60, **options)
        case.hidden[4] = NAN  # a row, not its neighbours
        teacher = head_case(n, v, 24, seed=70, vocab_size=options.get("vocab_size"))
        several = list(everything.items()) if name in ("plain", "vocab_size") else [list(everything.items())[i]]
        for loss, (divergence, ce_weight) in several:
            temperature = torch.linspace(0.5, 2.0, n) if i % 2 else 0.7
            settings = {"select": tip.SoftOr(0.5, scope="batch"), "divergence": divergence, "ce_weight": ce_weight}
            settings |= {"labels": labels, "row_mask": mask, "temperature": temperature, "temperature_sq": i == 2}
            whole = case.leaves().head
            one = distill(whole, teacher.head, **settings, sweeps=2)
            one.loss.backward()
            for other in (parts(group, teacher.head), teacher.head):  # a teacher in shards, and a whole one
                own = parts(group, whole)
                out = distill(own, other, **settings, workspace_mib=1)
                out.loss.backward()
                what = f"{name}, {loss}"
                close(f"{what}: loss", out.loss.detach(), one.loss.detach())
                assert torch.equal(out.kept.mask, one.kept.mask), what
                same_on_all_ranks(group, what, out.loss.detach())
                same_on_all_ranks(group, what, own.hidden.grad)
                truth = gradients(whole)
                truth[1:] = [shard(group, x) for x in truth[1:]]
                for leaf_name, ours, theirs in zip(("hidden", "weight", "bias"), gradients(own), truth, strict=False):
                    error = relative_error(ours, theirs.double())
                    assert ours.isfinite().all() and error <= 3e-6, f"{what}: d({leaf_name}) is off by {error:.1e}"
            assert one.loss > 0, what


@check(2)
def vocabulary_parallel_losses_of_banned_rows_equal_one_process(group):
    n, v = 24, 150
    for name, pair in PAIRS.items():
        z_s, z_t = pair(n, v)
        student, teacher = head_of_logits(z_s), head_of_logits(z_t)
        largest = z_s[z_s.isfinite()].abs().amax().item()
        for divergence in (tip.ForwardKL(), tip.Jeffreys(), tip.JSD(0.5), tip.TVD()):
            rows, ours = [], []
            for head in (student, parts(group, student)):
                leaves = tip.Head(leaf(head.hidden), leaf(head.weight), vocab_group=head.vocab_group)
                loss = tip.divergence_loss(leaves, teacher, divergence=divergence)
                torch.where(loss.detach().isfinite(), loss, 0.0).sum().backward()
                rows.append(loss.detach())
                ours.append(leaves)
            close(f"{name}, {divergence}", rows[1], rows[0])
            # d(weight) is that of the logits; d(hidden) is its product with them
            floor = 2e-7 * max(1.0, largest)
            close(f"{name}, {divergence}", ours[1].weight.grad, shard(group, ours[0].weight.grad), floor=floor)
            if z_s.isfinite().all():  # else it holds BANNED, of other rows
                close(f"{name}, {divergence}", ours[1].hidden.grad, ours[0].hidden.grad, floor=floor * largest)


@check(2)
def vocabulary_parallel_on_the_triton_backend_equals_one_process(group):
    """Interpreted. A shard narrower than a program's part, and one of several parts."""
    n, v = 3, 8192 + 2500
    student, teacher = (head_case(n, v, 8, seed=seed).leaves().head for seed in (80, 90))
    labels = torch.tensor([5, 9000, -100])
    asked = {"labels": labels, "margins": True}
    with tip.backend("triton"):
        one = tip.token_stats(student, teacher, **asked)
        cuts = [0, 8192 + 100, v]
        rank, weight = dist.get_rank(group), shard(group, student.weight, cuts)
        own = tip.Head(leaf(student.hidden), leaf(weight), vocab_group=group)
        ours = tip.token_stats(own, teacher, **asked)
        for field, value in fields_of(one).items():
            close(field, getattr(ours, field), value)
        for head in (student, own):
            rows = tip.divergence_loss(head, teacher, divergence=tip.JSD(0.3), stats=one if head is student else ours)
            rows.sum().backward()
    assert relative_error(own.hidden.grad, student.hidden.grad.double()) <= 3e-6
    assert relative_error(own.weight.grad, student.weight.grad[cuts[rank] : cuts[rank + 1]].double()) <= 3e-6


def refusal(call: Callable) -> str:
    try:
        call()
    except ValueError as error:
        return str(error)
    raise AssertionError("nothing was refused")


@check(2)
def what_shards_cannot_do_is_refused_alike_on_every_rank(group):
    rank, hidden, weight = dist.get_rank(group), normal(6, 8, seed=1), normal(40, 8, seed=2)
    own = tip.Head(hidden, shard(group, weight), vocab_group=group)
    elsewhere = tip.Head(hidden, shard(group, weight, [0, 20, 40]), vocab_group=group)
    listed = tip.TopK(torch.zeros(6, 1, dtype=torch.int64), torch.zeros(6, 1))
    for said, call in {
        "teacher: expected its vocabulary cut where the student's is, at tokens [0, 26, 40], got [0, 20, 40]": lambda: (
            tip.token_stats(own, elsewhere)
        ),
        "teacher: expected the student's vocab_group, or none": lambda: tip.token_stats(tip.Head(hidden, weight), own),
        "teacher: expected logits or a Head": lambda: tip.token_stats(own, listed),
        "teacher: expected the student's vocabulary of 40 entries, got 39": lambda: tip.token_stats(
            own, weight[:6, :1].expand(6, 39)
        ),
        "vocab_size: expected an int from 1 to the 40 weight rows of all ranks, got 41": lambda: tip.token_stats(
            tip.Head(hidden, own.weight, vocab_size=41, vocab_group=group)
        ),
        "vocab_group: expected the same vocab_size of the head on all ranks, got [30, 31]": lambda: tip.token_stats(
            tip.Head(hidden, own.weight, vocab_size=30 + rank, vocab_group=group)
        ),
        "vocab_group: expected hidden of the same shape on all ranks, got [6, 5]": lambda: tip.token_stats(
            tip.Head(hidden[rank:], own.weight, vocab_group=group)
        ),
        "labels: expected values from 0 to 39": lambda: tip.token_stats(own, labels=torch.full((6,), 40)),
        "vocab_group: expected a process group": lambda: tip.Head(hidden, own.weight, vocab_group="tp"),
        "sweeps: expected 2 or None, since one sweep takes a student's whole Head": lambda: distill(
            tip.Head(hidden, leaf(own.weight), vocab_group=group), own, sweeps=1
        ),
        "grad_filter: expected None with a vocab_group": lambda: distill(own, own, grad_filter=tip.GradFilter(1e-4)),
    }.items():
        text = refusal(call)
        assert text.startswith(said), text


@check(2)
def a_dtensor_head_is_gathered_or_with_a_group_measured_in_shards(group):
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor
    from torch.distributed.tensor.debug import CommDebugMode

    mesh = DeviceMesh.from_group(group, "cpu")
    student, teacher = head_case(12, 41, 8, seed=1).leaves().head, head_case(12, 41, 8, seed=2).head
    rank, settings = dist.get_rank(group), {"select": tip.SoftOr(0.5), "divergence": tip.Jeffreys()}
    distill(student, teacher, **settings).loss.backward()
    # Tensor parallel: the rows are the same
    weight = distribute_tensor(student.weight.detach(), mesh, [Shard(0)]).requires_grad_()
    hidden = leaf(student.hidden)
    distill(tip.Head(hidden, weight, vocab_group=group), teacher, **settings).loss.backward()
    assert weight.grad.placements == (Shard(0),)
    assert relative_error(weight.grad.full_tensor(), student.weight.grad.double()) <= 3e-6
    assert relative_error(hidden.grad, student.hidden.grad.double()) <= 3e-6
    # FSDP2: ranks have rows of their own, the gradient is the mean over the ranks
    weight, hidden = distribute_tensor(student.weight.detach(), mesh, [Shard(0)]).requires_grad_(), leaf(student.hidden)
    mine = slice(0, 8) if rank == 0 else slice(8, 12)
    with CommDebugMode() as sent:  # gathered once, for all sweeps, and the gradient scattered once
        rows = tip.Head(hidden[mine], weight), tip.Head(teacher.hidden[mine], teacher.weight)
        tip.divergence_loss(*rows, divergence=tip.JSD(0.3)).sum().backward()
    calls = {str(op).rpartition(".")[2]: count for op, count in sent.get_comm_counts().items()}
    assert calls == {"all_gather_into_tensor": 1, "reduce_scatter_tensor": 1}, calls
    student.weight.grad = None
    (0.5 * tip.divergence_loss(student, teacher, divergence=tip.JSD(0.3)).sum()).backward()
    assert weight.grad.placements == (Shard(0),)
    assert relative_error(weight.grad.full_tensor(), student.weight.grad.double()) <= 3e-6
    # Ambiguous or impossible
    replicated = distribute_tensor(student.weight.detach(), mesh, [Replicate()])
    text = refusal(lambda: tip.Head(hidden, replicated, vocab_group=group))
    assert text.startswith("weight: expected a DTensor sharded on dim 0 over the ranks of vocab_group"), text
    text = refusal(lambda: tip.Head(distribute_tensor(student.hidden.detach(), mesh, [Shard(0)]), weight))
    assert text.startswith("hidden: expected a plain tensor, or a DTensor that is replicated"), text


# ---- data-parallel: selection over ranks with rows of their own


def counts(size: int) -> list[int]:
    """Rows by rank: uneven, and none on one of four."""
    return [31, 9] if size == 2 else [17, 0, 20, 3]


def own(group: dist.ProcessGroup, x: Tensor) -> Tensor:
    """This rank's rows of x."""
    first = sum(counts(group.size())[: dist.get_rank(group)])
    return x[first : first + counts(group.size())[dist.get_rank(group)]]


def random_stats(n: int) -> tip.TokenStats:
    """Statistics of n rows with a NaN, infinities and ties."""
    gen = torch.Generator().manual_seed(5)
    entropy, kl, h = (torch.rand(n, generator=gen) for _ in range(3))
    entropy[3], kl[5], kl[20], h[7:9] = NAN, INF, INF, 0.5
    entropy[10:14] = entropy[30]
    fields = {"margin_t": h * 3, "mass_t_on_top_s": 1 - h, "logp_s": -kl, "logp_t": -h}
    return tip.TokenStats(entropy_s=entropy, entropy_t=h, kl_fwd=kl, kl_rev=2 * kl, hellinger_sq=h, **fields)


def rules(scope: str, group=None) -> list[tip.Rule]:
    """The first rank's generator is the single process's; the others' would draw other rows."""

    def drawn():
        return torch.Generator().manual_seed(7 + (dist.get_rank(group) if group else 0))

    made = []
    for keep in (0.3, 7):
        at = {"keep": keep, "scope": scope, "group": group}
        made += [tip.SoftOr(**at), tip.SoftOr(**at, normalize="minmax"), tip.TopEntropy(**at), tip.TopDivergence(**at)]
        made += [tip.TopHellinger(**at), tip.TopMargin(**at), tip.RandomRows(**at, generator=drawn())]
        made += [tip.Overconfident(**at, entropy_below=("quantile", 0.8), divergence_above=("quantile", 0.1))]
        made += [tip.SampleEntropy(**at, gamma=1, generator=drawn(), unbiased=True)]
        made += [tip.EntropyGap(**at, weighted=True), tip.CrossEntropyRatio(**at), tip.Teachability(**at)]
        made += [tip.PositionPrefix(**at)]
    return made


@check(2, 4)
def a_global_quota_keeps_what_one_process_would(group):
    """And with rollout_ids each rollout's quota, though its rows lie on several ranks."""
    n = 40
    stats, mask = random_stats(n), torch.arange(n) % 5 != 1
    ids = torch.arange(n) * 7 % 3
    mine = tip.TokenStats(**{name: own(group, x) for name, x in fields_of(stats).items()})
    for one, many in zip(rules("batch"), rules("global", group), strict=True):
        kept = one(stats, mask)
        ours = many(mine, own(group, mask))
        assert torch.equal(ours.mask, own(group, kept.mask)), many
        assert torch.equal(ours.scores, own(group, kept.scores)), many
        if kept._weights is not None:
            assert torch.equal(ours._weights, own(group, kept._weights)), many
    for one, many in zip(rules("rollout"), rules("global", group), strict=True):
        kept = one(stats, mask, rollout_ids=ids)
        ours = many(mine, own(group, mask), rollout_ids=own(group, ids))
        assert torch.equal(ours.mask, own(group, kept.mask)), many
    text = refusal(lambda: tip.TopEntropy(0.3 + 0.1 * dist.get_rank(group), scope="global", group=group)(mine))
    assert text.startswith("scope: expected 'global' selections of one kind on all ranks"), text


@check(2, 4)
def distill_over_ranks_adds_up_to_one_process(group):
    """Rows of their own on every rank, one of which has none of the kept ones; the selection and the gradient."""
    n = 40
    student, teacher = head_case(n, 50, 8, seed=30).leaves().head, head_case(n, 50, 8, seed=31)
    first, last = 0, counts(group.size())[0]
    with torch.no_grad():
        teacher.hidden[first:last] *= 0.01
        student.hidden[first:last] *= 0.01  # both flat and alike: nothing is kept of the first rank
    mask = torch.arange(n) % 4 != 1
    for normalizer in ("kept", "all"):
        for rule, divergence in (
            ("TopDivergence", tip.ReverseKL()),
            ("TopHellinger", tip.JSD(0.5)),
            ("RandomRows", tip.TVD()),
        ):
            gen = {"generator": torch.Generator().manual_seed(3)} if rule == "RandomRows" else {}
            settings = {"divergence": divergence, "normalizer": normalizer, "workspace_mib": 4}
            one = distill(
                student, teacher.head, select=getattr(tip, rule)(0.15, scope="batch", **gen), row_mask=mask, **settings
            )
            student.hidden.grad = student.weight.grad = None
            one.loss.backward()
            scores = one.kept.scores[mask].sort().values
            quota = int(one.kept.mask.sum())
            assert rule == "RandomRows" or scores[-quota] - scores[-quota - 1] > 1e-5
            gen = {"generator": torch.Generator().manual_seed(3)} if rule == "RandomRows" else {}
            hidden, weight = leaf(own(group, student.hidden)), leaf(student.weight)
            out = distill(
                tip.Head(hidden, weight),
                tip.Head(own(group, teacher.hidden), teacher.weight),
                select=getattr(tip, rule)(0.15, scope="global", group=group, **gen),
                row_mask=own(group, mask),
                **settings,
            )
            out.loss.backward()
            assert torch.equal(out.kept.mask, own(group, one.kept.mask)), rule
            assert rule == "RandomRows" or dist.get_rank(group) or not out.kept.mask.any()
            total = out.loss.detach().clone()
            dist.all_reduce(total, group=group)
            close(rule, total, one.loss.detach())
            dist.all_reduce(weight.grad, group=group)
            assert relative_error(weight.grad, student.weight.grad.double()) <= 3e-6, rule
            assert relative_error(hidden.grad, own(group, student.hidden.grad).double()) <= 3e-6, rule


def bytes_received() -> int | None:
    """What this process got by TCP, headers of gloo included; None where the system does not tell."""
    if not sys.platform.startswith("linux"):
        return None
    received = 0
    for link in Path("/proc/self/fd").iterdir():
        if not link.is_socket():
            continue
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(int(link.name))) as connection:
            info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 136)
            received += struct.unpack_from("Q", info, 128)[0] if len(info) == 136 else 0  # tcpi_bytes_received
    return received


@check(2, 4)
def the_wire_carries_what_is_planned(group):
    """Calls and payloads to the byte, and what came by TCP within 4 % (gloo's headers), in each layout of the ranks."""
    size, rank, n, v, width = group.size(), dist.get_rank(group), 2048, 300, 128
    layouts = [(1, size, None, group), (size, 1, group, None)]
    if size == 4:
        rows = [dist.new_group(pair) for pair in ([0, 2], [1, 3])][rank % 2]
        shards = [dist.new_group(pair) for pair in ([0, 1], [2, 3])][rank // 2]
        layouts += [(2, 2, rows, shards)]
    for data_parallel, vocab_parallel, rows, shards in layouts:
        each = n // data_parallel  # the same rows on every data-parallel rank, so that they keep as many
        student, teacher = (head_case(each, v, w, seed=w).head for w in (width, 24))
        for rule in (tip.SoftOr, tip.TopEntropy):
            planned = wire.collectives(
                n, v, width, 24, 0.25, data_parallel=data_parallel, vocab_parallel=vocab_parallel, kind="cpu",
                entropy_rule=rule is tip.TopEntropy, weight_bytes=4,
            )  # fmt: skip
            student = tip.Head(leaf(student.hidden), leaf(student.weight))
            heads = [student, teacher] if shards is None else [parts(shards, student), parts(shards, teacher)]
            select = rule(0.25, scope="batch") if rows is None else rule(0.25, scope="global", group=rows)
            dist.barrier(group=group)
            before, counted = bytes_received(), Counter()
            with counting(counted):
                distill(*heads, select=select, sweeps=2).loss.backward()
                if rows is not None:  # as DDP does
                    dist.all_reduce(heads[0].weight.grad, group=rows)
            dist.barrier(group=group)
            after = bytes_received()
            for op in ("all-gather", "all-reduce"):
                of_op = [c for c in planned if c.op == op]
                assert counted[op, "calls"] == sum(c.calls for c in of_op), (op, planned, counted)
                if shards is None:  # else d(head) is of uneven parts
                    assert counted[op, "bytes"] == sum(c.payload for c in of_op), (op, planned, counted)
            if before is not None:
                ours, theirs = torch.tensor(after - before), size * sum(c.sent for c in planned)
                dist.all_reduce(ours, group=group)
                assert abs(int(ours) / theirs - 1) < 0.04, (data_parallel, vocab_parallel, ours, theirs)


@contextlib.contextmanager
def counting(counted: Counter):
    """Counts the calls of torch.distributed and the bytes that each is handed."""
    real = dist.all_gather, dist.all_reduce

    def all_gather(out, x, **options):
        counted.update({("all-gather", "calls"): 1, ("all-gather", "bytes"): x.numel() * x.element_size()})
        return real[0](out, x, **options)

    def all_reduce(x, **options):
        counted.update({("all-reduce", "calls"): 1, ("all-reduce", "bytes"): x.numel() * x.element_size()})
        return real[1](x, **options)

    dist.all_gather, dist.all_reduce = all_gather, all_reduce
    try:
        yield
    finally:
        dist.all_gather, dist.all_reduce = real


@check(4)
def shards_of_the_vocabulary_and_of_the_rows_go_together(group):
    """Two ranks of rows, each of two shards."""
    rank = dist.get_rank(group)
    rows = [dist.new_group(pair) for pair in ([0, 2], [1, 3])][rank % 2]
    shards = [dist.new_group(pair) for pair in ([0, 1], [2, 3])][rank // 2]
    student, teacher = head_case(30, 50, 8, seed=30).leaves().head, head_case(30, 50, 8, seed=31)
    one = distill(student, teacher.head, select=tip.SoftOr(0.3, scope="batch"))
    one.loss.backward()
    mine = slice(0, 19) if rank < 2 else slice(19, 30)
    hidden, weight = leaf(student.hidden[mine]), leaf(shard(shards, student.weight))
    own_head = tip.Head(hidden, weight, vocab_group=shards)
    own_teacher = tip.Head(teacher.hidden[mine], teacher.weight)
    out = distill(own_head, own_teacher, select=tip.SoftOr(0.3, scope="global", group=rows))
    out.loss.backward()
    assert torch.equal(out.kept.mask, one.kept.mask[mine])
    dist.all_reduce(weight.grad, group=rows)
    assert relative_error(weight.grad, shard(shards, student.weight.grad).double()) <= 3e-6
    assert relative_error(hidden.grad, student.hidden.grad[mine].double()) <= 3e-6
    text = refusal(lambda: distill(own_head, own_teacher, select=tip.SoftOr(0.3, scope="global")))
    assert text.startswith("select: expected a group beside scope 'global'"), text


@check(2)
def a_step_of_the_main_job_is_that_of_one_process_on_all_rollouts(group):
    """The gradient is that of the mean over the tokens all ranks kept, by a loss that is not divided at all."""
    from tip_kernels.opd.pair import load_pair
    from tip_kernels.opd.ranks import Ranks
    from tip_kernels.opd.settings import PACKAGED, Settings
    from tip_kernels.opd.task import load_task
    from tip_kernels.opd.train import Loop

    class Pair(Ranks):  # as Ranks, but of this group
        def total(self, numbers):
            total = torch.tensor(numbers, dtype=torch.float64)
            dist.all_reduce(total, group=group)
            return total.tolist()

    cpu, task = torch.device("cpu"), load_task("addition", 5)
    ddp = torch.nn.parallel.DistributedDataParallel
    torch.nn.parallel.DistributedDataParallel = lambda model: ddp(model, process_group=group)
    try:
        for scope in ("rollout", "batch"):
            pair = load_pair(PACKAGED / "teacher", PACKAGED / "student", cpu)
            loop = Loop(Settings(batch=5, scope=scope, keep=0.3), pair, task, cpu, Pair(dist.get_rank(group), 2))
            before = [weight.detach().clone() for weight in loop.weights]
            seen = []
            loop.distil = lambda rollouts, seen=seen, distil=loop.distil: seen.append(rollouts) or distil(rollouts)
            row = loop.step()
            after, averaged = [w.detach().clone() for w in loop.weights], [w.grad.clone() for w in loop.weights]
            assert row["grad_norm"] > 1.0  # it was clipped to 1
            for x in after:
                same_on_all_ranks(group, "weights", x)
            evaluated = loop.evaluate()
            assert sum(evaluated["entropy_histogram"]["counts"]) > 100
            with torch.no_grad():
                for weight, old in zip(loop.weights, before, strict=True):
                    weight.copy_(old)
                    weight.grad = None
            loop.student, loop.counters.step = pair.student, 0
            choice = loop.choice(seen[0].mask) | {"normalizer": 1.0}
            heads = [train_head(side, seen[0]) for side in (pair.student, pair.teacher)]
            out = distill(*heads, divergence=loop.divergence, **choice)
            out.loss.backward()
            kept, loss = loop.ranks.total([int(out.kept.mask.sum()), out.loss.item()])
            assert row["kept"] == kept and row["rows"] == loop.ranks.total([int(seen[0].mask.sum())])[0]
            assert abs(row["loss"] - loss / kept) <= 1e-5 * row["loss"]
            for weight, ours in zip(loop.weights, averaged, strict=True):
                dist.all_reduce(weight.grad, group=group)
                error = relative_error(ours * row["grad_norm"], weight.grad.double() / kept)
                assert error <= 1e-4, f"{scope}: off by {error:.1e}"
    finally:
        torch.nn.parallel.DistributedDataParallel = ddp


@check(2)
def a_step_in_micro_batches_on_all_ranks_is_one_big_batch(group):
    """Of a different number on each rank; the rows to the bit, the gradient to 1e-6, a quota for every rollout."""
    n, rank = 40, dist.get_rank(group)
    student, teacher = head_case(n, 50, 8, seed=30).leaves().head, head_case(n, 50, 8, seed=31).head
    mask, ids = torch.arange(n) % 4 != 1, torch.arange(n) // 5
    rules = {
        "SoftOr": lambda **where: {"select": tip.SoftOr(0.4, **where)},
        "Overconfident": lambda **where: {"select": tip.Overconfident(0.4, **where)},
        "AdaKD": lambda **where: adakd_choice(**where),
    }

    def adakd_choice(scope, group=None, median_of="kept"):
        median = "batch" if scope == "rollout" else "global"
        how = {"scope": scope, "median_scope": median, "median_of": median_of, "group": group}
        choice = tip.adakd(0.6, row_mask=mask, rollout_ids=ids, **how)
        return {name: choice[name] for name in ("select", "temperature", "temperature_sq")}

    mine = list(range(0, 25)) if rank == 0 else list(range(25, n))
    sizes = [7, 18] if rank == 0 else [4, 1, 10]
    for name, rule in rules.items():
        student.hidden.grad = student.weight.grad = None
        one = tip.distill(student, teacher, row_mask=mask, rollout_ids=ids, **rule(scope="rollout"))
        one.loss.backward()
        step = tip.StepSelection(**rule(scope="global", group=group))
        hidden, weight = leaf(student.hidden), leaf(student.weight)
        rows = [torch.tensor(mine[sum(sizes[:i]) :][:size]) for i, size in enumerate(sizes)]

        def heads(at, hidden=hidden, weight=weight):
            return tip.Head(hidden[at], weight), tip.Head(teacher.hidden[at], teacher.weight)

        for at in rows:
            step.measure(*heads(at), row_mask=mask[at], rollout_ids=ids[at])
        total = torch.zeros(())
        for at, part in zip(rows, step.parts(), strict=True):
            out = tip.distill(*heads(at), **part)
            assert torch.equal(out.kept.mask, one.kept.mask[at]), name
            out.loss.backward()
            total += out.loss.detach()
        dist.all_reduce(total, group=group)
        close(name, total, one.loss.detach())
        dist.all_reduce(weight.grad, group=group)
        dist.all_reduce(hidden.grad, group=group)
        for ours, expected in ((weight.grad, student.weight.grad), (hidden.grad, student.hidden.grad)):
            assert (ours - expected).abs().max() <= 1e-6 * expected.abs().max(), name


@check(2)
def the_main_job_in_micro_batches_takes_the_same_step(group):
    """Whose number differs between the ranks; gradients are averaged once."""
    from tip_kernels.opd.pair import load_pair
    from tip_kernels.opd.ranks import Ranks
    from tip_kernels.opd.settings import PACKAGED, Settings
    from tip_kernels.opd.task import load_task
    from tip_kernels.opd.train import Loop

    class Pair(Ranks):  # as Ranks, but of this group
        def total(self, numbers):
            total = torch.tensor(numbers, dtype=torch.float64)
            dist.all_reduce(total, group=group)
            return total.tolist()

    cpu, task = torch.device("cpu"), load_task("addition", 5)
    ddp = torch.nn.parallel.DistributedDataParallel
    torch.nn.parallel.DistributedDataParallel = lambda model: ddp(model, process_group=group)
    try:
        rows, losses, gradients = [], [], []
        for size in (None, 2, 1):
            pair = load_pair(PACKAGED / "teacher", PACKAGED / "student", cpu)
            settings = Settings(batch=5, keep=0.3, rule="overconfident", scope="rollout", micro_batch=size)
            loop = Loop(settings, pair, task, cpu, Pair(dist.get_rank(group), 2))
            row = loop.step()
            rows.append([row["kept"], row["rows"], row["kept_share"], row["q3"]])
            gradients.append(torch.cat([w.grad.flatten() for w in loop.weights]).double() * row["grad_norm"])
            same_on_all_ranks(group, "gradients", gradients[-1])
            losses.append(row["loss"])
        assert rows[0] == rows[1] == rows[2]
        assert max(losses) <= (1 + 1e-5) * min(losses)
        for gradient in gradients[1:]:
            assert relative_error(gradient, gradients[0]) <= 1e-5
    finally:
        torch.nn.parallel.DistributedDataParallel = ddp


@check(4)
def the_page_s_block_runs(group):
    """On two ranks of rows, each of two shards."""
    page = (Path(__file__).parent.parent / "docs" / "guides" / "distributed.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", page, flags=re.S)
    rank = dist.get_rank(group)
    rows = [dist.new_group(pair) for pair in ([0, 2], [1, 3])][rank % 2]
    shards = [dist.new_group(pair) for pair in ([0, 1], [2, 3])][rank // 2]
    case, teacher = head_case(20, 50, 8, seed=30), head_case(20, 50, 8, seed=31).head
    hidden, weight = leaf(case.hidden[rank // 2 * 10 :][:10]), leaf(shard(shards, case.weight))
    names = {"tip": tip, "hidden": hidden, "my_rows_of_the_head": weight, "data_parallel_ranks": 2}
    names |= {"teacher": tip.Head(teacher.hidden[rank // 2 * 10 :][:10], teacher.weight)}
    exec(block, names | {"tensor_parallel_group": shards, "data_parallel_group": rows})
    whole = case.leaves()
    distill(whole.head, teacher, select=tip.SoftOr(0.2, scope="batch")).loss.backward()
    dist.all_reduce(weight.grad, group=rows)
    assert relative_error(weight.grad / 2, shard(shards, whole.weight.grad).double()) <= 3e-6


def train_head(side, rollouts) -> tip.Head:
    from tip_kernels.opd.train import response_head

    return response_head(side, rollouts)


# ---- models in shards (FSDP)


def tiny_lm(tied: bool, seed: int = 0):
    import transformers

    sizes = {"vocab_size": 24, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 16}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": tied}
    torch.manual_seed(seed)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads, initializer_range=0.3))


def fsdp2(resharded: bool | None = None, layers: bool = False, head: bool = False):
    def shard_model(model, group):
        from torch.distributed.device_mesh import DeviceMesh
        from torch.distributed.fsdp import fully_shard

        options = {"mesh": DeviceMesh.from_group(group, "cpu")}
        options |= {} if resharded is None else {"reshard_after_forward": resharded}
        for unit in (*(model.model.layers if layers else ()), *([model.lm_head] if head else []), model):
            fully_shard(unit, **options)
        return model

    return shard_model


def fsdp1(**options):
    def shard_model(model, group):
        from torch.distributed.fsdp import FullyShardedDataParallel

        return FullyShardedDataParallel(model, process_group=group, device_id=torch.device("cpu"), **options)

    return shard_model


SHARDED = {
    "the root alone": fsdp2(),
    "layers and root": fsdp2(layers=True),
    "all sharded again after forward": fsdp2(True, layers=True),
    "a head of its own": fsdp2(layers=True, head=True),
    "FSDP1, original parameters": fsdp1(use_orig_params=True),
    "FSDP1, flat parameters": fsdp1(),
}


@check(2)
def sharded_models_learn_through_heads_as_whole_ones_do(group):
    """Two steps of two micro-batches each: every parameter moves as in one process on the rows of both ranks."""
    from tip_kernels.hooks.transformers import distill_batch

    rank, size = dist.get_rank(group), dist.get_world_size(group)
    tokens = torch.randint(0, 24, (2 * size, 9), generator=torch.Generator().manual_seed(1))
    batches = [{"input_ids": x, "labels": x} for x in tokens.split(2)]
    teacher = tiny_lm(False, seed=9)
    for name, shard_model in SHARDED.items():
        for tied in (False, True):
            if tied and name == "a head of its own":
                continue
            whole, own = tiny_lm(tied), shard_model(tiny_lm(tied), group)
            optimizers = [torch.optim.SGD(model.parameters(), 0.5) for model in (whole, own)]
            for _ in range(2):
                for optimizer in optimizers:
                    optimizer.zero_grad()
                losses = [distill_batch(whole, teacher, batch).loss for batch in batches]
                (sum(losses) / size).backward()
                loss = distill_batch(own, teacher, batches[rank]).loss
                loss.backward()
                assert abs(loss.item() / losses[rank].item() - 1) < 1e-5, (name, tied)
                assert all(w.grad is not None for w in own.parameters() if w.numel()), (name, tied)
                for optimizer in optimizers:
                    optimizer.step()
            with torch.no_grad():
                x = {"input_ids": tokens}
                gap = (own(**x).logits - whole(**x).logits).norm() / whole(**x).logits.norm()
                start = (tiny_lm(tied)(**x).logits - whole(**x).logits).norm() / whole(**x).logits.norm()
            assert gap < 1e-4 < 0.05 < start, (name, tied, gap, start)


@check(2)
def a_head_that_fsdp1_frees_is_refused_on_every_rank(group):
    from functools import partial

    from torch.distributed.fsdp.wrap import lambda_auto_wrap_policy

    from tip_kernels.hooks.transformers import head_of

    policy = partial(lambda_auto_wrap_policy, lambda_fn=lambda module: isinstance(module, torch.nn.Linear))
    model = fsdp1(use_orig_params=True, auto_wrap_policy=policy)(tiny_lm(False), group)
    text = refusal(lambda: head_of(model, input_ids=torch.arange(4).view(1, 4)))
    assert "an output layer whose weight stays, got LlamaForCausalLM, which shards it again" in text, text


# ---- a rank that is gone


def lose_a_rank(rank: int, way: str, folder: str) -> None:
    """Rank 1 measures once and is then killed or stopped; rank 0 goes on, and writes what happened and when."""
    dist.init_process_group("gloo", f"file://{folder}/rendezvous", timedelta(seconds=3), 2, rank)
    head = tip.Head(normal(6, 8, seed=1), normal(20, 8, seed=2 + rank), vocab_group=dist.group.WORLD)
    tip.token_stats(head)
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL if way == "killed" else signal.SIGSTOP)
    start = time.monotonic()
    try:
        for _ in range(100):
            tip.token_stats(head)
    except RuntimeError as error:
        Path(folder, "said.json").write_text(json.dumps([str(error), time.monotonic() - start]))


# ---- the end of a process


def vocabulary_parallel_losses(group: dist.ProcessGroup) -> list:
    """What every way to a loss leaves behind on a rank, graphs included; nothing here keeps the head."""
    rank, count = dist.get_rank(group), dist.get_world_size(group)
    weight = leaf(normal(20, 8, seed=2).chunk(count)[rank])
    head, teacher = tip.Head(leaf(normal(6, 8, seed=1)), weight, vocab_group=group), normal(6, 20, seed=3)
    ways = [distill(head, teacher, select=tip.KeepAll(), divergence=d) for d in (tip.ReverseKL(), tip.JSD(0.3))]
    ways.append(distill(head, teacher, select=tip.SoftOr(0.5, scope="global", group=group), backward=True))
    return [*ways, tip.divergence_loss(head, head), tip.token_stats(head, teacher)]


def end_runs(folder: str, runs: int) -> None:
    """Prints the exit codes of both ranks of as many runs, which end with a loss that is referenced."""
    torch.set_num_threads(1)
    codes = []
    for run in range(runs):
        children = []
        for rank in (0, 1):
            child = os.fork()
            if child == 0:  # which ends as any interpreter does
                dist.init_process_group(
                    "gloo", f"file://{folder}/{run}", timedelta(seconds=60), rank=rank, world_size=2
                )
                sys.modules["__main__"].kept = vocabulary_parallel_losses(dist.group.WORLD)
                return dist.destroy_process_group()
            children.append(child)
        codes += [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    print(json.dumps(codes))
