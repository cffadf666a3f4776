"""What is known of each token of some rollouts, as a table in memory and in a file.

A file is safetensors, one tensor a column, or Parquet (where pyarrow is installed), one row a token:

    column                              what                                                   safetensors    Parquet
    rollout                             which rollout the token is in, ascending               int64 (N,)     int
    text                                what the token adds to the rollout's text              metadata       string
    entropy_s, kl_rev, any other name   a statistic                                            float32 (N,)   double
    kept                                the rule chose it (may be missing)                     uint8 (N,)     bool
    top_s, top_t                        the likeliest tokens of student and teacher (too)      int64 (N, K)   list
    top_s_p, top_t_p                    their probabilities; NaN where there is none           float32 (N, K) list
    prompt, group, right, ended         of the rollout (may be missing)                        metadata       scalar

In safetensors the top lists hold places in `strings`, and the metadata's `strings`, `text` (N of them), `rollouts` (a
list of objects) and `about` are JSON; in Parquet they hold the text itself. N tokens, K entries, B rollouts, T places.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, chain
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from tip_kernels._checks import expect, flat_rows, is_int
from tip_kernels.inspect.usage import UsageError
from tip_kernels.select.quadrants import quadrants
from tip_kernels.select.rule import Kept
from tip_kernels.sources.from_models import likeliest
from tip_kernels.sources.pair import rows_of
from tip_kernels.sources.topk import TopK
from tip_kernels.stats import STATISTICS as MEASURED
from tip_kernels.stats import TokenStats

FORMAT = "tip-kernels tokens 1"
SUFFIXES = (".safetensors", ".parquet")
STATISTICS = {  # those that have a name of their own on the page, in the order shown
    "entropy_s": "student entropy",
    "entropy_t": "teacher entropy",
    "kl_rev": "KL(student ‖ teacher)",
    "kl_fwd": "KL(teacher ‖ student)",
    "hellinger_sq": "squared Hellinger",
    "score": "rule's score",
    "logp_s": "student log p",
    "logp_t": "teacher log p",
}
ROLLOUT_FIELDS = ("prompt", "group", "right", "ended")


class Top(NamedTuple):
    """The K likeliest tokens of each row: places in the table's `strings` (-1: none), and their probabilities."""

    places: Tensor  # (N, K) int64
    p: Tensor  # (N, K) fp32


@dataclass
class TokenTable:
    """N tokens of R rollouts, in reading order; `load` and `save` say how it is stored."""

    rollout: Tensor  # (N,) int64 in [0, R), ascending
    text: list[str]  # N
    statistics: dict[str, Tensor]  # (N,) fp32 each, in nats unless said
    kept: Tensor | None = None  # (N,) bool
    top_s: Top | None = None
    top_t: Top | None = None
    strings: list[str] = field(default_factory=list)
    rollouts: list[dict] = field(default_factory=list)  # R of them, with any of ROLLOUT_FIELDS
    about: dict[str, str] = field(default_factory=dict)  # facts to show above the rollouts

    def quadrants(self, entropy: float = 0.3, divergence: float = 0.1) -> Tensor:
        """(N,) int8 as `quadrants`; 0 everywhere where entropy_s or kl_rev was not measured."""
        if not {"entropy_s", "kl_rev"} <= self.statistics.keys():
            return torch.zeros(len(self.text), dtype=torch.int8)
        stats = TokenStats(entropy_s=self.statistics["entropy_s"], kl_rev=self.statistics["kl_rev"])
        return quadrants(stats, entropy=entropy, divergence=divergence)

    def save(self, path: Path | str) -> None:
        """Write the table: Parquet where the name ends in .parquet, safetensors in .safetensors."""
        path = Path(path)
        if path.suffix not in SUFFIXES:
            raise ValueError(f"path: expected a name in .safetensors or .parquet, got {str(path)!r}")
        if path.suffix == ".parquet":
            self._save_parquet(path)
        else:
            self._save_safetensors(path)

    @classmethod
    def load(cls, path: Path | str) -> TokenTable:
        """Read what `save` wrote, or a Parquet file of the same columns; UsageError says what is wrong with it."""
        path = Path(path)
        if not path.is_file():
            raise UsageError(f"argument FILE: expected a file of statistics, got {str(path)!r}, which is not there")
        if path.suffix not in SUFFIXES:
            raise UsageError(f"argument FILE: expected a name in .safetensors or .parquet, got {str(path)!r}")
        try:
            table = _load_parquet(path) if path.suffix == ".parquet" else _load_safetensors(path)
            table._check_kinds()
            table._check(path)
        except UsageError:
            raise
        except Exception as error:  # whatever a file of another make can hold
            reason = " ".join(repr(error).split())[:200]
            raise UsageError(f"argument FILE: expected what save_statistics writes in {path}, got: {reason}") from None
        return table

    @classmethod
    def join(cls, tables: Sequence[TokenTable]) -> TokenTable:
        """One table after the other; a statistic that a table lacks is NaN there."""
        counts, strings = [len(table.text) for table in tables], _Strings()
        places = [torch.tensor([*map(strings.place, table.strings), -1]) for table in tables]
        names = dict.fromkeys(chain.from_iterable(table.statistics for table in tables))
        starts = accumulate((len(table.rollouts) for table in tables), initial=0)
        return cls(
            rollout=torch.cat([table.rollout + start for table, start in zip(tables, starts, strict=False)]),
            text=list(chain.from_iterable(table.text for table in tables)),
            statistics={
                name: _filled([table.statistics.get(name) for table in tables], counts, math.nan) for name in names
            },
            kept=_joined([table.kept for table in tables], counts, False),
            top_s=_joined_tops([table.top_s for table in tables], counts, places),
            top_t=_joined_tops([table.top_t for table in tables], counts, places),
            strings=strings.listed,
            rollouts=list(chain.from_iterable(table.rollouts for table in tables)),
            about=dict(chain.from_iterable(table.about.items() for table in tables)),
        )

    def _check_kinds(self) -> None:
        """ValueError where something is not of the kind that its field says."""
        for name, columns in {
            "rollout": [self.rollout],
            "a statistic": self.statistics.values(),
            "kept": [self.kept],
        }.items():
            if any(column is not None and column.dim() != 1 for column in columns):
                raise ValueError(f"{name} that is no column")
        for name in ("text", "strings"):
            if not all(isinstance(text, str) for text in getattr(self, name)):
                raise ValueError(f"{name} that is no list of texts")
        kinds = {"prompt": str, "group": str, "right": bool, "ended": bool}
        for rollout in self.rollouts:
            if not all(isinstance(value, kinds[name]) for name, value in rollout.items()):
                raise ValueError(f"a rollout of {rollout!r}")
        if not all(isinstance(name, str) for name in self.about):
            raise ValueError("about that is no object")
        self.about = {name: str(value) for name, value in self.about.items()}

    def _check(self, path: Path) -> None:
        """UsageError where columns do not fit each other."""
        n, many = len(self.text), len(self.rollouts)
        sizes = {"rollout": len(self.rollout)} | {name: len(values) for name, values in self.statistics.items()}
        sizes |= {"kept": n if self.kept is None else len(self.kept)}
        sizes |= {"top_s": self._rows_of_top("top_s", path), "top_t": self._rows_of_top("top_t", path)}
        for name, size in sizes.items():
            if size != n:
                raise UsageError(f"argument FILE: {path}: expected {n} rows in {name}, as in text, got {size}")
        if n == 0:
            raise UsageError(f"argument FILE: {path}: expected at least one token, got none")
        if not self.statistics:
            raise UsageError(f"argument FILE: {path}: expected at least one statistic such as entropy_s, got none")
        steps = self.rollout.diff()
        if int(self.rollout[0]) < 0 or int(self.rollout[-1]) >= many or (steps.numel() and int(steps.min()) < 0):
            raise UsageError(f"argument FILE: {path}: expected rollout to ascend within 0 to {many - 1}")

    def _rows_of_top(self, name: str, path: Path) -> int:
        """How many rows a top list has, -1 for one of a wrong shape; UsageError where it points beside the strings."""
        top: Top | None = getattr(self, name)
        if top is None:
            return len(self.text)
        if top.places.dim() != 2 or top.places.shape != top.p.shape:
            return -1
        if top.places.numel():
            least, most = (int(place) for place in top.places.aminmax())
            if not -1 <= least <= most < max(len(self.strings), 1):
                raise UsageError(f"argument FILE: {path}: expected places of the {len(self.strings)} strings in {name}")
        return len(top.places)

    def _save_safetensors(self, path: Path) -> None:
        from safetensors.torch import save_file

        tensors = {"rollout": self.rollout} | {f"statistic.{name}": v for name, v in self.statistics.items()}
        if self.kept is not None:
            tensors["kept"] = self.kept.to(torch.uint8)
        for name, top in (("top_s", self.top_s), ("top_t", self.top_t)):
            if top is not None:
                tensors |= {name: top.places, f"{name}_p": top.p}
        listed = {"strings": self.strings, "text": self.text, "rollouts": self.rollouts, "about": self.about}
        metadata = {"format": FORMAT} | {name: json.dumps(value) for name, value in listed.items()}
        save_file({name: value.contiguous() for name, value in tensors.items()}, path, metadata=metadata)

    def _save_parquet(self, path: Path) -> None:
        arrow, parquet = _pyarrow()
        columns = {"rollout": self.rollout.tolist(), "text": self.text}
        columns |= {name: values.tolist() for name, values in self.statistics.items()}
        if self.kept is not None:
            columns["kept"] = self.kept.tolist()
        for name, top in (("top_s", self.top_s), ("top_t", self.top_t)):
            if top is not None:
                rows = top.places.tolist()
                columns[name] = [[self.strings[i] if i >= 0 else None for i in row] for row in rows]
                columns[f"{name}_p"] = top.p.tolist()
        for name in ROLLOUT_FIELDS:
            if any(name in rollout for rollout in self.rollouts):
                columns[name] = [self.rollouts[i].get(name) for i in self.rollout.tolist()]
        table = arrow.table(columns)
        parquet.write_table(table.replace_schema_metadata({"about": json.dumps(self.about)}), path)


def _joined(columns: list[Tensor | None], counts: list[int], fill: float | bool) -> Tensor | None:
    """One column after the other, with fill for each that is missing; None if all are."""
    if all(column is None for column in columns):
        return None
    return _filled(columns, counts, fill)


def _filled(columns: list[Tensor | None], counts: list[int], fill: float | bool) -> Tensor:
    return torch.cat([torch.full((n,), fill) if c is None else c for c, n in zip(columns, counts, strict=True)])


def _joined_tops(tops: list[Top | None], counts: list[int], places: list[Tensor]) -> Top | None:
    """One list after the other, as wide as the widest; places holds each table's in the strings of all, and -1."""
    width = max((top.p.shape[1] for top in tops if top is not None), default=None)
    if width is None:
        return None
    ids = [torch.full((n, width), -1) for n in counts]
    p = [torch.full((n, width), math.nan) for n in counts]
    for i, top in enumerate(tops):
        if top is not None:
            ids[i][:, : top.p.shape[1]] = places[i][top.places]
            p[i][:, : top.p.shape[1]] = top.p
    return Top(torch.cat(ids), torch.cat(p))


def save_statistics(
    path: Path | str,
    stats: TokenStats,
    tokens: Tensor,
    tokenizer,
    *,
    row_mask: Tensor | None = None,
    kept: Kept | None = None,
    student=None,
    teacher=None,
    top_k: int = 5,
    rollouts: Sequence[Mapping[str, object]] | None = None,
    workspace_mib: float = 256,
) -> None:
    """Writes what a loop has measured of B rollouts to a file that `tip-kernels inspect` shows.

    Copies to the CPU, so synchronises.

    Args:
        path: Ends in .safetensors, or in .parquet (which needs pyarrow).
        stats: TokenStats of a (B, T) batch, from token_stats or distill; every (N,) statistic in it is written.
        tokens: int64 (B, T): the token that each row predicts, as labels.
        tokenizer: With decode(ids) and convert_ids_to_tokens(ids), as transformers' have.
        row_mask: bool (B, T), True for the rollout's own tokens; only these are written. None: all.
        kept: What the rule returned, or None.
        student: The source that was measured (Head, logits or TopK), for its likeliest tokens; None: left out.
        teacher: The same.
        top_k: int of at least 1: how many of them.
        rollouts: B mappings with any of prompt (str), group (str), right (bool), ended (bool).
        workspace_mib: MiB that the likeliest tokens may use.

    Raises:
        ValueError: Naming the argument.
        UsageError: Without pyarrow.
    """
    table_of(
        stats, tokens, tokenizer, row_mask=row_mask, kept=kept, student=student, teacher=teacher, top_k=top_k,
        rollouts=rollouts, workspace_mib=workspace_mib,
    ).save(path)  # fmt: skip


@torch.no_grad()
def table_of(
    stats: TokenStats,
    tokens: Tensor,
    tokenizer,
    *,
    row_mask: Tensor | None = None,
    kept: Kept | None = None,
    student=None,
    teacher=None,
    top_k: int = 5,
    rollouts: Sequence[Mapping[str, object]] | None = None,
    workspace_mib: float = 256,
) -> TokenTable:
    """The table of what a loop has measured; arguments as in `save_statistics`."""
    expect(isinstance(stats, TokenStats), "stats", "TokenStats, as token_stats returns them", stats)
    ok = isinstance(tokens, Tensor) and tokens.dim() == 2 and tokens.dtype == torch.int64
    expect(ok, "tokens", "an int64 tensor of shape (B, T)", tokens)
    n_rollouts, flat = tokens.shape[0], tokens.numel()
    expect(is_int(top_k) and top_k >= 1, "top_k", "an int of at least 1", top_k)
    measured = _measured(stats, flat)
    rows = torch.ones(flat, dtype=torch.bool)
    if row_mask is not None:
        rows = flat_rows("row_mask", row_mask, tuple(tokens.shape), (torch.bool,), row_mask.device).cpu()
    if kept is not None:
        expect(kept.mask.numel() == flat, "kept", f"what a rule returned for {flat} rows", kept)
        measured["score"] = kept.scores
    given = [{} for _ in range(n_rollouts)] if rollouts is None else [dict(rollout) for rollout in rollouts]
    expect(len(given) == n_rollouts, "rollouts", f"{n_rollouts} mappings, as tokens have rows", len(given))
    mask, strings, naming = rows.view(tokens.shape), _Strings(), {}
    own = [ids[where].tolist() for ids, where in zip(tokens.cpu(), mask, strict=True)]
    top_s, top_t = (
        _top(source, top_k, rows, tokenizer, strings, naming, workspace_mib) for source in (student, teacher)
    )
    return TokenTable(
        rollout=torch.arange(n_rollouts).repeat_interleave(mask.sum(1)),
        text=[piece for ids in own for piece in pieces(tokenizer, ids)],
        statistics={name: value.float().cpu()[rows] for name, value in _in_order(measured).items()},
        kept=None if kept is None else kept.mask.cpu()[rows],
        top_s=top_s,
        top_t=top_t,
        strings=strings.listed,
        rollouts=given,
    )


def _measured(stats: TokenStats, n_rows: int) -> dict[str, Tensor]:
    """The statistics that are there, without normalizers."""
    values = {name: stats._get(name) for name in MEASURED if not name.startswith("lse")}
    measured = {name: value for name, value in values.items() if value is not None}
    expect(bool(measured), "stats", "at least one measured statistic", stats)
    for name, value in measured.items():
        expect(value.numel() == n_rows, "stats", f"{name} of {n_rows} rows, as tokens have", value)
    return measured


def _in_order(statistics: dict[str, Tensor]) -> dict[str, Tensor]:
    """Those that have a name of their own on the page, as it shows them, then the others."""
    first = {name: statistics[name] for name in STATISTICS if name in statistics}
    return first | statistics


class _Strings:
    """Distinct strings, each with its place in the list."""

    def __init__(self):
        self.listed: list[str] = []
        self.places: dict[str, int] = {}

    def place(self, text: str) -> int:
        if text not in self.places:
            self.places[text] = len(self.listed)
            self.listed.append(text)
        return self.places[text]


def _top(source, k: int, rows: Tensor, tokenizer, strings: _Strings, naming: dict[int, int], mib: float) -> Top | None:
    """The k likeliest tokens of a source's rows; `naming` remembers the places of token ids."""
    if source is None:
        return None
    if isinstance(source, TopK):
        listed = source.logp.float().flatten(0, -2).masked_fill(source.ids.flatten(0, -2) < 0, -math.inf)
        logp, order = listed.topk(min(k, listed.shape[1]), -1)
        ids = source.ids.flatten(0, -2).gather(1, order)
    else:
        found = likeliest(source, min(k, rows_of(source, "student").vocab), mib)
        ids, logp = found.ids.flatten(0, -2), found.logp.flatten(0, -2)
    ids, p = ids.cpu()[rows], logp.cpu()[rows].exp()
    present = ids[p > 0].unique().tolist()
    fresh = [i for i in present if i not in naming]
    naming |= {i: strings.place(name) for i, name in zip(fresh, names(tokenizer, fresh), strict=True)}
    lookup = torch.full((int(ids.max()) + 1 if ids.numel() else 1,), -1)
    if present:
        lookup[present] = torch.tensor([naming[i] for i in present])
    return Top(torch.where(p > 0, lookup[ids.clamp(min=0)], -1), torch.where(p > 0, p, math.nan))


def _decode(tokenizer, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def pieces(tokenizer, ids: list[int]) -> list[str]:
    """What each token adds to the decoded text; "" for a token that ends within a character, which the next completes.

    Decoded in a sliding window, as serving engines stream text: a token alone may lose its blank or half a character.
    """
    found, start, done = [], 0, 0
    for end in range(1, len(ids) + 1):
        before, after = _decode(tokenizer, ids[start:done]), _decode(tokenizer, ids[start:end])
        if len(after) > len(before) and not (after.endswith("�") and end < len(ids)):
            found.append(after[len(before) :])
            start, done = done, end
        else:
            found.append("")
    return found


def names(tokenizer, ids: list[int]) -> list[str]:
    """Each token by itself, with its blank where it has one; the vocabulary's own entry where it is no whole text."""
    if not ids:
        return []
    anchor = ids[0]
    bare = _decode(tokenizer, [anchor])
    found = []
    for i, entry in zip(ids, tokenizer.convert_ids_to_tokens(ids), strict=True):
        text = _decode(tokenizer, [anchor, i])
        text = text[len(bare) :] if text.startswith(bare) else ""
        found.append(text if text and "�" not in text else str(entry))
    return found


def _load_safetensors(path: Path) -> TokenTable:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        raise UsageError(f"argument FILE: expected safetensors in {path}, got: {error}") from None
    if metadata.get("format") != FORMAT:
        raise UsageError(
            f"argument FILE: expected statistics that save_statistics wrote ({FORMAT}), got {path}, which holds"
            f" {metadata.get('format', 'something else')!r}"
        )

    def top(name: str) -> Top | None:
        return Top(tensors[name].long(), tensors[f"{name}_p"].float()) if name in tensors else None

    statistics = {n.removeprefix("statistic."): t.float() for n, t in tensors.items() if n.startswith("statistic.")}
    return TokenTable(
        rollout=tensors["rollout"].long(),
        statistics=_in_order(statistics),
        kept=tensors["kept"].bool() if "kept" in tensors else None,
        top_s=top("top_s"),
        top_t=top("top_t"),
        **{name: json.loads(metadata[name]) for name in ("strings", "text", "rollouts", "about")},
    )


def _pyarrow():
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UsageError("argument FILE: .parquet needs pyarrow: pip install pyarrow") from None
    return pyarrow, pyarrow.parquet


def _load_parquet(path: Path) -> TokenTable:
    arrow, parquet = _pyarrow()
    try:
        table = parquet.read_table(path)
    except (arrow.ArrowException, OSError) as error:
        raise UsageError(f"argument FILE: expected Parquet in {path}, got: {error}") from None
    columns = {name: table.column(name).to_pylist() for name in table.column_names}
    if missing := [name for name in ("rollout", "text") if name not in columns]:
        raise UsageError(f"argument FILE: expected a column {missing[0]!r} in {path}, got {', '.join(columns)}")
    strings = _Strings()
    rollout, rollouts = _rollouts_of(columns)
    own = {"rollout", "text", "kept", "top_s", "top_t", *ROLLOUT_FIELDS}
    return TokenTable(
        rollout=rollout,
        text=[text or "" for text in columns["text"]],
        statistics={name: _numbers(columns[name]) for name in _numeric(table.schema) if name not in own},
        kept=torch.tensor([bool(value) for value in columns["kept"]]) if "kept" in columns else None,
        top_s=_listed("top_s", columns, strings),
        top_t=_listed("top_t", columns, strings),
        strings=strings.listed,
        rollouts=rollouts,
        about=json.loads((table.schema.metadata or {}).get(b"about", b"{}")),
    )


def _rollouts_of(columns: Mapping[str, list]) -> tuple[Tensor, list[dict]]:
    """Which rollout each row is of, (N,) int64 in the order of their first rows, and what those rows say of them."""
    place: dict[object, int] = {}
    rollouts: list[dict] = []
    for i, rollout in enumerate(columns["rollout"]):
        if rollout not in place:
            place[rollout] = len(place)
            said = {name: columns[name][i] for name in ROLLOUT_FIELDS if name in columns}
            rollouts.append({name: value for name, value in said.items() if value is not None})
    return torch.tensor([place[rollout] for rollout in columns["rollout"]]), rollouts


def _numeric(schema) -> list[str]:
    """The names of the columns that hold numbers or truth values."""
    from pyarrow import types

    tests = (types.is_floating, types.is_integer, types.is_boolean)
    return [field.name for field in schema if any(test(field.type) for test in tests)]


def _numbers(column: list) -> Tensor:
    """fp32, NaN for what is missing."""
    return torch.tensor([math.nan if value is None else float(value) for value in column])


def _listed(name: str, columns: Mapping[str, list], strings: _Strings) -> Top | None:
    """The top lists of a column and of the one of their probabilities, as wide as the widest of them."""
    if name not in columns or f"{name}_p" not in columns:
        return None
    width = max((len(row) for row in columns[name] if row), default=0)

    def padded(column: list, read: Callable, fill: float) -> list[list]:
        rows = [[fill if value is None else read(value) for value in row or []] for row in column]
        return [row + [fill] * (width - len(row)) for row in rows]

    places = torch.tensor(padded(columns[name], strings.place, -1))
    return Top(places, torch.tensor(padded(columns[f"{name}_p"], float, math.nan)))
