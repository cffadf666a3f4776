"""What every sweep over kept rows shares, and the row sums that a two-pass divergence needs before its gradient.

S kept rows, R rows of a block, V vocabulary, C columns of a tile.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tip_kernels.backends.eager import row_grad
from tip_kernels.distributed.collectives import all_reduce_sum_
from tip_kernels.sources.logits import Block
from tip_kernels.sources.pair import Pair
from tip_kernels.workspace import columns_of


@dataclass(frozen=True)
class RowSweep:
    """What every sweep over kept rows shares: the rows, both models' normalizers, and how tiles are made."""

    ids: Tensor  # (S,) int64
    normalizers: Mapping[str, Tensor]  # (S,) shift and logsum of both models
    temperature: float | Tensor  # or (S,)
    workspace: int
    backend: str

    def restricted_to(self, places: Tensor) -> RowSweep:
        return replace(
            self,
            ids=self.ids[places],
            normalizers=rows_of_all(self.normalizers, places),
            temperature=self.temperature[places] if isinstance(self.temperature, Tensor) else self.temperature,
        )

    def tiling(self, pair: Pair, buffers: int, slice_width: int = 0) -> tuple[list[slice], int, list[Tensor]]:
        """The blocks of rows, the columns of a tile, and a buffer for each source's tiles of logits."""
        n_rows = self.ids.numel()
        block, columns = pair.tile_shape(n_rows, self.workspace, buffers, slice_width=slice_width)
        parts = [slice(r0, min(r0 + block, n_rows)) for r0 in range(0, n_rows, block)]
        return parts, columns, [torch.empty(block * columns, device=pair.device) for _ in pair.sources]

    def temperature_at(self, part: slice) -> float | Tensor:
        return self.temperature[part].unsqueeze(1) if isinstance(self.temperature, Tensor) else self.temperature

    def columns_at(self, part: slice) -> dict[str, Tensor]:
        return {name: value[part].unsqueeze(1) for name, value in self.normalizers.items()}

    @torch.no_grad()
    def sums_of(self, pair: Pair, terms: list[row_grad.Term]) -> list[dict[str, Tensor]]:
        """The row sums of each term; a term brings its name and parameters."""
        parts, columns, buffers = self.tiling(pair, buffers=8)
        done: list[list[dict[str, Tensor]]] = []
        with torch.autocast(pair.device.type, enabled=False):
            for part in parts or [slice(0, 0)]:
                blocks = pair.blocks(self.ids[part])
                totals: list[dict[str, Tensor]] = []
                for v0, v1 in columns_of(max(pair.student.columns, 1), columns):
                    z_s, z_t = tiles_of(blocks, [None, None], buffers, v0, v1)
                    sums = self._tile_sums(z_s, z_t, terms, part)
                    totals = (
                        [{k: a[k] + b[k] for k in a} for a, b in zip(totals, sums, strict=True)] if totals else sums
                    )
                done.append(totals)
        sums = [
            {name: torch.cat([totals[i][name] for totals in done]) for name in done[0][i]} for i in range(len(terms))
        ]
        if pair.shard is None:
            return sums
        every = all_reduce_sum_(torch.stack([x for named in sums for x in named.values()]), pair.shard.group)
        rows = iter(every)
        return [{name: next(rows) for name in named} for named in sums]

    def _tile_sums(self, z_s: Tensor, z_t: Tensor, terms: list[row_grad.Term], part: slice) -> list[dict[str, Tensor]]:
        if self.backend == "triton":
            from tip_kernels.backends.triton.row_sums import row_sums

            tau = self.temperature[part] if isinstance(self.temperature, Tensor) else self.temperature
            return row_sums(z_s, z_t, rows_of_all(self.normalizers, part), terms, temperature=tau)
        tau = self.temperature_at(part)
        return row_grad.row_sums(over_(z_s, tau), over_(z_t, tau), terms, self.columns_at(part))


def rows_of_all(values: Mapping[str, Tensor], places: Tensor | slice) -> dict[str, Tensor]:
    """Some rows of each of the tensors."""
    return {name: value[places] for name, value in values.items()}


def over_(z: Tensor, temperature: float | Tensor) -> Tensor:
    """z / temperature, in place."""
    return z if isinstance(temperature, float) and temperature == 1.0 else z.div_(temperature)


def tiles_of(
    blocks: Sequence[Block], weights: Sequence[Tensor | None], buffers: Sequence[Tensor], v0: int, v1: int
) -> list[Tensor]:
    """Logit tiles (R, C) of each source in the buffers, after scale and softcap, at temperature 1."""
    n_rows = blocks[0].n_rows
    return [
        block.tile(v0, v1, buffer[: n_rows * (v1 - v0)].view(n_rows, v1 - v0), weight)
        for block, buffer, weight in zip(blocks, buffers, weights, strict=True)
    ]
