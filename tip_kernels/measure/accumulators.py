"""What one walk over the vocabulary gathers of a block of rows: moments, the label's logit, the largest logits.

R rows of a block, C columns of a tile.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from tip_kernels.backends.eager import online
from tip_kernels.backends.eager.toplist import TopList
from tip_kernels.measure.topk_teacher import hide_columns, take_columns
from tip_kernels.sources.logits import Rows
from tip_kernels.stats import STUDENT_FIELDS, Blend, Fields

State = dict[Hashable, Tensor]  # of the same names, shapes and dtypes on every rank


class Accumulator(Protocol):
    """Gathers something of R rows, tile by tile, and merges it over the ranks."""

    def add(self, tiles: list[Tensor], v0: int, scratch: list[Tensor]) -> None:
        """tiles (R, C) of one or two models, fp32 logits at temperature 1; scratch of their shapes, maybe the same.

        The last accumulators of a walk may overwrite the tiles.
        """

    def state(self) -> State:
        """What was gathered, in the same shapes and dtypes on every rank."""

    def finish(self, states: list[State], fields: Fields) -> Fields:
        """The statistics of all ranks' states; fields holds those of the accumulators after this one."""


class EagerMoments:
    """The fold of eager/online.py."""

    def __init__(self, fold: online.Fold, temperature: float | Tensor) -> None:
        self.fold, self.temperature, self.unit = fold, temperature, 1 / (online.NATS * temperature)
        self.parts: list[State] = []

    def add(self, tiles: list[Tensor], v0: int, scratch: list[Tensor]) -> None:
        unit = self.unit.unsqueeze(1) if isinstance(self.unit, Tensor) else self.unit
        self.parts.append(self.fold(tiles[0], tiles[1] if len(tiles) == 2 else None, unit, scratch))

    def state(self) -> State:
        return online.merge(self.parts, self.unit)

    def finish(self, states: list[State], fields: Fields) -> Fields:
        return online.finish(online.merge(states, self.unit), self.temperature)


class ListedMoments:
    """The fold of eager/online.py for the student alone, listed tokens apart from the rest; at temperature 1.

    Listed tokens are banned in the tiles and folded as one part more, so that no sum over the rest cancels.
    """

    def __init__(self, ids: Tensor, columns: int, vocab: int, want: frozenset[str | Blend]) -> None:
        self.ids, want = ids, want & STUDENT_FIELDS
        self.fold = online.Fold(*ids.shape[:1], columns, 1, want, ids.device)
        self.fold_listed = online.Fold(*ids.shape, 1, want, ids.device)
        self.z = torch.where(
            (ids >= vocab) | (ids < -1), torch.nan, torch.full(ids.shape, -torch.inf, device=ids.device)
        )
        self.parts: list[State] = []

    def add(self, tiles: list[Tensor], v0: int, scratch: list[Tensor]) -> None:
        self.z = take_columns(tiles[0], self.ids, v0, self.z)
        hide_columns(tiles[0], self.ids, v0)
        self.parts.append(self.fold(tiles[0], None, 1 / online.NATS))

    def state(self) -> State:
        return online.merge(self.parts, 1 / online.NATS)

    def finish(self, states: list[State], fields: Fields) -> Fields:
        unit = 1 / online.NATS
        rest = online.merge(states, unit)
        out = online.finish(online.merge([rest, self.fold_listed(self.z.clone(), None, unit)], unit), 1.0)
        some = rest["k_s"] > online.FLOOR
        return out | {
            "topk_logits": torch.where(self.z <= online.FLOOR, -torch.inf, self.z) - out["shift_s"].unsqueeze(1),
            "shift_rest": torch.where(some, rest["k_s"], 0.0),
            "logsum_rest": torch.where(some, rest["L_s"].log(), -torch.inf),
        }


class TritonMoments:
    """The fold of kernels/row_stats.py, on tiles that a library's GEMM made."""

    def __init__(self, n_rows: int, source: Rows, temperature: float | Tensor, teacher: bool, margins: bool) -> None:
        from tip_kernels.backends.triton import row_stats

        self.kernels, self.widest = row_stats, max(source.widest, 1)
        settings = {"teacher": teacher, "margins": margins, "temperature": temperature}
        self.rows = row_stats.new_state(n_rows, max(source.columns, 1), source.device, **settings)

    def add(self, tiles: list[Tensor], v0: int, scratch: list[Tensor]) -> None:
        self.kernels.fold_tile(self.rows, *tiles, column=v0)

    def state(self) -> State:
        sums, part = self.rows.sums, self.rows.part
        if missing := -(-self.widest // part) - sums.shape[1]:  # parts that wider ranks have: nothing but banned tokens
            empty = sums.new_zeros(sums.shape[0], missing, sums.shape[2])
            empty[[0, 3] if self.rows.teacher else [0]] = online.FLOOR
            sums = torch.cat([sums, empty], 1)
        return {"sums": sums}

    def finish(self, states: list[State], fields: Fields) -> Fields:
        sums = [state["sums"] for state in states]
        return self.kernels.finish(replace(self.rows, sums=sums[0] if len(sums) == 1 else torch.cat(sums, 1)))


class LabelLogits:
    """Each model's logit of each row's label, which one rank has; NaN for none."""

    def __init__(self, labels: Tensor, source: Rows, n_models: int, temperature: float | Tensor) -> None:
        self.column, self.columns, self.temperature = labels - source.first, source.columns, temperature
        self.z = [torch.full(labels.shape, torch.nan, device=labels.device) for _ in range(n_models)]

    def add(self, tiles: list[Tensor], v0: int, scratch: list[Tensor]) -> None:
        inside = (self.column >= v0) & (self.column < min(v0 + tiles[0].shape[1], self.columns))
        place = (self.column - v0).clamp(0, tiles[0].shape[1] - 1).unsqueeze(1)
        self.z = [torch.where(inside, t.gather(1, place).squeeze(1), z) for t, z in zip(tiles, self.z, strict=True)]

    def state(self) -> State:
        return dict(enumerate(self.z))

    def finish(self, states: list[State], fields: Fields) -> Fields:
        out: Fields = {}
        for i, model in zip(states[0], "st", strict=False):
            z = torch.stack([state[i] for state in states])
            only = torch.where(z.isnan().all(0), torch.nan, torch.where(z.isnan(), -torch.inf, z).amax(0))
            out |= label_field(model, only, self.temperature, fields)
        return out


class TopLists:
    """Each model's largest logits, with the other model's at the same tokens: margins, agreement, top-k statistics."""

    def __init__(
        self, n_rows: int, sources: list[Rows], want: frozenset[str | Blend], top_k: int, temperature: float | Tensor
    ) -> None:
        self.want, self.top_k, self.temperature, self.first = want, top_k, temperature, sources[0].first
        self.tops = [TopList(n_rows, max(top_k, 2), sources[0].device) for _ in sources]

    def add(self, tiles: list[Tensor], v0: int, scratch: list[Tensor]) -> None:
        for top, z, other in zip(self.tops, tiles, tiles[::-1], strict=True):
            top.update(z, other, self.first + v0)

    def state(self) -> State:
        return {(i, name): x for i, top in enumerate(self.tops) for name, x in top.state().items()}

    def finish(self, states: list[State], fields: Fields) -> Fields:
        if len(states) > 1:
            for i, top in enumerate(self.tops):
                top.merge([{name: x for (j, name), x in state.items() if i == j} for state in states])
        return list_fields(self.tops, fields, self.top_k, self.want, self.temperature)


def label_field(model: str, z: Tensor, temperature: float | Tensor, out: Fields) -> Fields:
    """The log-probability of a label from its logit z (R,) at temperature 1, NaN for none."""
    logp = (z / temperature - out[f"shift_{model}"]) - out[f"logsum_{model}"]
    return {f"logp_{model}": torch.where(z <= online.FLOOR, -torch.inf, logp) + 0.0 * out[f"logsum_{model}"]}


def list_fields(
    tops: list[TopList],
    out: Fields,
    top_k: int,
    want: frozenset[str | Blend],
    temperature: float | Tensor,
) -> dict[str, Tensor]:
    """Margins, agreement and top-k statistics from the models' lists of largest logits."""
    fields: dict[str, Tensor] = {}
    for model, top in zip("st", tops, strict=False):
        if f"margin_{model}" in want:
            values, nan = top.values, 0.0 * out[f"logsum_{model}"]
            second = values[:, 1] if values.shape[1] > 1 else torch.full_like(nan, -torch.inf)
            margin = (values[:, 0] - second) / temperature
            fields[f"margin_{model}"] = torch.where(second <= online.FLOOR, torch.inf, margin) + nan
    if len(tops) == 2:
        top_s, top_t = tops
        best = top_s.ids[:, :1]
        nan = 0.0 * (out["logsum_s"] + out["logsum_t"])
        whole = ~nan.isnan()
        fields["agree"] = whole & (best.squeeze(1) == top_t.ids[:, 0])
        if top_k:
            tau = temperature.unsqueeze(1) if isinstance(temperature, Tensor) else temperature
            logp = (top_s.payload[:, :top_k] / tau - out["shift_t"].unsqueeze(1)) - out["logsum_t"].unsqueeze(1)
            listed = top_s.values[:, :top_k] > online.FLOOR
            fields["mass_t_on_top_s"] = torch.where(listed, logp.exp(), 0.0).sum(1).clamp_(max=1.0) + nan
            hit = (top_t.ids[:, :top_k] == best) & (top_t.values[:, :top_k] > online.FLOOR) & whole.unsqueeze(1)
            fields["rank_t_of_argmax_s"] = torch.where(hit.any(1), hit.int().argmax(1), top_k)
    return fields
