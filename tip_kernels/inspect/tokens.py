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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import tip_kernels as tip
from tip_kernels._checks import expect, flat_rows, is_int
from tip_kernels.opd import UsageError
from tip_kernels.stats import STATISTICS as MEASURED

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
        """(N,) int8 as `tip.quadrants`; 0 everywhere where entropy_s or kl_rev was not measured."""
        if not {"entropy_s", "kl_rev"} <= self.statistics.keys():
            return torch.zeros(len(self.text), dtype=torch.int8)
        stats = tip.TokenStats(entropy_s=self.statistics["entropy_s"], kl_rev=self.statistics["kl_rev"])
        return tip.quadrants(stats, entropy=entropy, divergence=divergence)

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
        names = list(dict.fromkeys(name for table in tables for name in table.statistics))
        counts = [len(table.text) for table in tables]
        strings, places = _Strings(), []
        for table in tables:
            places.append(torch.tensor([strings.place(text) for text in table.strings] + [-1]))

        def column(pick, fill) -> Tensor:
            return torch.cat([fill(n) if pick(t) is None else pick(t) for t, n in zip(tables, counts, strict=True)])

        def top(pick) -> Top | None:
            found = [pick(table) for table in tables]
            widths = [entry.p.shape[1] for entry in found if entry is not None]
            if not widths:
                return None
            ids = [torch.full((n, max(widths)), -1) for n in counts]
            p = [torch.full((n, max(widths)), math.nan) for n in counts]
            for i, entry in enumerate(found):
                if entry is not None:
                    ids[i][:, : entry.p.shape[1]] = places[i][entry.places]
                    p[i][:, : entry.p.shape[1]] = entry.p
            return Top(torch.cat(ids), torch.cat(p))

        starts = [sum(len(table.rollouts) for table in tables[:i]) for i in range(len(tables))]
        return cls(
            rollout=torch.cat([table.rollout + start for table, start in zip(tables, starts, strict=True)]),
            text=[text for table in tables for text in table.text],
            statistics={
                name: column(lambda t, name=name: t.statistics.get(name), lambda n: torch.full((n,), math.nan))
                for name in names
            },
            kept=None
            if all(table.kept is None for table in tables)
            else column(lambda t: t.kept, lambda n: torch.zeros(n, dtype=torch.bool)),
            top_s=top(lambda t: t.top_s),
            top_t=top(lambda t: t.top_t),
            strings=strings.listed,
            rollouts=[rollout for table in tables for rollout in table.rollouts],
            about={key: value for table in tables for key, value in table.about.items()},
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
        n, many = len(self.text), len(self.rollouts)
        sizes = {"rollout": len(self.rollout)} | {name: len(values) for name, values in self.statistics.items()}
        sizes |= {"kept": n if self.kept is None else len(self.kept)}
        for name, top in (("top_s", self.top_s), ("top_t", self.top_t)):
            if top is not None:
                ok = top.places.dim() == 2 and top.places.shape == top.p.shape
                sizes[name] = len(top.places) if ok else -1
                if (
                    ok
                    and top.places.numel()
                    and not -1 <= int(top.places.min()) <= int(top.places.max()) < max(len(self.strings), 1)
                ):
                    raise UsageError(
                        f"argument FILE: {path}: expected places of the {len(self.strings)} strings in {name}"
                    )
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


def save_statistics(
    path: Path | str,
    stats: tip.TokenStats,
    tokens: Tensor,
    tokenizer,
    *,
    row_mask: Tensor | None = None,
    kept: tip.Kept | None = None,
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
    stats: tip.TokenStats,
    tokens: Tensor,
    tokenizer,
    *,
    row_mask: Tensor | None = None,
    kept: tip.Kept | None = None,
    student=None,
    teacher=None,
    top_k: int = 5,
    rollouts: Sequence[Mapping[str, object]] | None = None,
    workspace_mib: float = 256,
) -> TokenTable:
    """The table of what a loop has measured; arguments as in `save_statistics`."""
    expect(isinstance(stats, tip.TokenStats), "stats", "TokenStats, as token_stats returns them", stats)
    ok = isinstance(tokens, Tensor) and tokens.dim() == 2 and tokens.dtype == torch.int64
    expect(ok, "tokens", "an int64 tensor of shape (B, T)", tokens)
    shape, flat = tuple(tokens.shape), tokens.numel()
    expect(is_int(top_k) and top_k >= 1, "top_k", "an int of at least 1", top_k)
    measured = {
        name: value for name in MEASURED if not name.startswith("lse") and (value := stats._get(name)) is not None
    }
    expect(bool(measured), "stats", "at least one measured statistic", stats)
    for name, value in measured.items():
        expect(value.numel() == flat, "stats", f"{name} of {flat} rows, as tokens have", value)
    if row_mask is None:
        rows = torch.ones(flat, dtype=torch.bool)
    else:
        rows = flat_rows("row_mask", row_mask, shape, (torch.bool,), row_mask.device).cpu()
    if kept is not None:
        expect(kept.mask.numel() == flat, "kept", f"what a rule returned for {flat} rows", kept)
        measured["score"] = kept.scores
    given = [dict(rollout) for rollout in rollouts] if rollouts is not None else [{} for _ in range(shape[0])]
    expect(len(given) == shape[0], "rollouts", f"{shape[0]} mappings, as tokens have rows", len(given))
    order = [name for name in STATISTICS if name in measured] + [n for n in measured if n not in STATISTICS]
    ids, strings = tokens.cpu(), _Strings()
    mask = rows.view(shape)
    text = [piece for b in range(shape[0]) for piece in pieces(tokenizer, ids[b][mask[b]].tolist())]
    naming: dict[int, int] = {}
    tops = [_top(source, top_k, rows, tokenizer, strings, naming, workspace_mib) for source in (student, teacher)]
    return TokenTable(
        rollout=torch.arange(shape[0]).repeat_interleave(mask.sum(1)),
        text=text,
        statistics={name: measured[name].float().cpu()[rows] for name in order},
        kept=None if kept is None else kept.mask.cpu()[rows],
        top_s=tops[0],
        top_t=tops[1],
        strings=strings.listed,
        rollouts=given,
    )


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
    if isinstance(source, tip.TopK):
        listed = source.logp.float().flatten(0, -2).masked_fill(source.ids.flatten(0, -2) < 0, -math.inf)
        logp, order = listed.topk(min(k, listed.shape[1]), -1)
        ids = source.ids.flatten(0, -2).gather(1, order)
    else:
        from tip_kernels.opd.pair import likeliest
        from tip_kernels.sources.pair import rows_of

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
    listed = {name: json.loads(metadata[name]) for name in ("strings", "text", "rollouts", "about")}
    tops = {
        name: Top(tensors[name].long(), tensors[f"{name}_p"].float()) if name in tensors else None
        for name in ("top_s", "top_t")
    }
    statistics = {n.removeprefix("statistic."): t.float() for n, t in tensors.items() if n.startswith("statistic.")}
    order = [n for n in STATISTICS if n in statistics] + [n for n in statistics if n not in STATISTICS]
    kept = tensors["kept"].bool() if "kept" in tensors else None
    return TokenTable(
        tensors["rollout"].long(), statistics={n: statistics[n] for n in order}, kept=kept, **tops, **listed
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
    columns = {name: table.column(name) for name in table.column_names}
    if missing := [name for name in ("rollout", "text") if name not in columns]:
        raise UsageError(f"argument FILE: expected a column {missing[0]!r} in {path}, got {', '.join(columns)}")
    ids, strings = columns["rollout"].to_pylist(), _Strings()
    firsts = {rollout: i for i, rollout in reversed(list(enumerate(ids)))}
    place = {rollout: i for i, rollout in enumerate(sorted(firsts, key=firsts.get))}
    fields = {name: columns[name].to_pylist() for name in ROLLOUT_FIELDS if name in columns}
    rollouts = [
        {name: values[firsts[rollout]] for name, values in fields.items() if values[firsts[rollout]] is not None}
        for rollout in place
    ]
    numeric = (arrow.types.is_floating, arrow.types.is_integer, arrow.types.is_boolean)
    statistics = {
        name: torch.tensor([math.nan if v is None else float(v) for v in column.to_pylist()])
        for name, column in columns.items()
        if name not in ("rollout", "text", "kept", "top_s", "top_t", *ROLLOUT_FIELDS)
        and any(test(column.type) for test in numeric)
    }

    def top(name: str) -> Top | None:
        if name not in columns or f"{name}_p" not in columns:
            return None
        texts, ps = columns[name].to_pylist(), columns[f"{name}_p"].to_pylist()
        width = max((len(row) for row in texts if row), default=0)
        places = [[-1 if s is None else strings.place(s) for s in row or []] for row in texts]
        filled = [[math.nan if v is None else v for v in row or []] for row in ps]
        pad = lambda rows, fill: [row + [fill] * (width - len(row)) for row in rows]  # noqa: E731
        return Top(torch.tensor(pad(places, -1)), torch.tensor(pad(filled, math.nan)))

    kept = torch.tensor([bool(v) for v in columns["kept"].to_pylist()]) if "kept" in columns else None
    about = json.loads((table.schema.metadata or {}).get(b"about", b"{}"))
    return TokenTable(
        torch.tensor([place[rollout] for rollout in ids]),
        [text or "" for text in columns["text"].to_pylist()],
        statistics,
        kept,
        top("top_s"),
        top("top_t"),
        strings.listed,
        rollouts,
        about,
    )
