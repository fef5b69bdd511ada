"""One edit at every head in turn: exact, resumable, without computing what stays the same."""

from __future__ import annotations

import hashlib
import inspect
import itertools
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from .. import anatomy as anatomies
from ..edits import Edit, parse_edit
from ..errors import EditError, HeadError, MetricError, SweepError
from ..heads import Head
from ..output import require_output
from ..patching import patch
from ..prompts import PromptSet
from ..provenance import provenance
from ..report.progress import progress_over
from .journal import Journal, require_same
from .metrics import as_metric
from .result import SUFFIXES, Result
from .rows import OnRows
from .runs import Batch, Condition, Meter, Taken, batches, prompts_for, require_options
from .statistics import compared, false_discovery
from .stubs import Trunk

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

#: Bytes that one layer's attention of variants that share a pass may take.
_SHARED_BYTES = 512 * 2**20
#: Bytes of layers' outputs that are kept from the intact run; beyond, each is computed in its turn.
_AHEAD_BYTES = 1024 * 2**20


@dataclass(frozen=True)
class Variant:
    """One row of a sweep."""

    index: int
    head: Head
    offset: int | None
    edit: Edit


def sweep(
    model: TransformerBridge,
    make_edit: str | Callable[..., Any] = "KnockOut({head}, 1)",
    heads: Any = None,
    metric: Any = "copying",
    prompts: Any = None,
    *,
    offsets: Any = None,
    path: str | os.PathLike[str] | None = None,
    resume: bool = False,
    random_tokens: bool = False,
    n_prompts: int = 16,
    max_tokens: int | None = 65,
    batch_size: int | None = None,
    per_pass: int | None = None,
    confidence: float = 0.95,
    seed: int = 0,
    progress: bool | None = None,
) -> Result:
    """The effect of an edit at every head, one at a time, on one metric.

    Layers before the edited one are not computed again: their output is kept. The result is that
    of patching and running the whole model, bit for bit, where variants do not share a pass.

    Args:
        model: A TransformerBridge; active patches are part of "intact".
        make_edit: A text with {head} (and {offset}), or a function of a head (and an offset).
        heads: Which; None for all.
        metric: A name, function or object that gives one number per prompt.
        prompts: As for `measure`; None: repeated random tokens for metrics of copying.
        offsets: Δ to sweep beside the heads, if `make_edit` takes one.
        path: .parquet or .json to write. Until it is finished, rows stand in a file beside it, its
            name and ".unfinished"; a run that was killed goes on with `resume`.
        resume: Go on with an unfinished sweep, or give back a finished one. A sweep of another
            model, data, seed or version is refused.
        random_tokens: As for `measure`, and so are the following.
        n_prompts: How many. With few, p-values cannot be small enough to be told among many heads.
        max_tokens: Their length.
        batch_size: Prompts per pass.
        per_pass: How many variants of one layer share a pass. None: one on the CPU, where it saves
            nothing; elsewhere as many as memory allows. More than one changes results by rounding.
        confidence: Of the intervals.
        seed: Of prompts, resamples and sign flips.
        progress: Whether to show a bar with the time left; when None, on a terminal only.

    Returns:
        A Result; `frame` has a row per head (and offset), the largest effect first.

    Raises:
        EditError, HeadError, OffsetError, MetricError, PromptError, OutputError, or SweepError for
        a file of another sweep.
    """
    require_options(seed, confidence, n_prompts=n_prompts, batch_size=batch_size, per_pass=per_pass)
    variants = _variants(model, make_edit, heads, offsets)
    meter = Meter(model, [as_metric(metric)])
    target = None if path is None else Path(path)
    require_output(target, SUFFIXES)
    found = prompts_for(
        model,
        meter.metrics,
        prompts,
        random_tokens=random_tokens,
        n_prompts=n_prompts,
        max_tokens=max_tokens,
        seed=seed,
    )
    origin = provenance(
        model,
        metric=meter.names[0],
        prompts=found.record,
        swept=_digest(variants),
        confidence=confidence,
        seed=seed,
    )
    if target is None:
        rows = _Run(model, meter, found, batch_size, per_pass, progress).all(variants, None)
        return _result(variants, rows, origin)
    unfinished = target.with_name(target.name + ".unfinished")
    if resume and target.exists() and not unfinished.exists():
        done = Result.load(target)
        require_same(origin, done.provenance, target)
        if done.kind != "sweep" or len(done.frame) != len(variants):
            raise SweepError(f"{str(target)!r} is no finished sweep; choose another file")
        return done
    indexes = range(-1, len(variants))
    with Journal(unfinished, origin, resume, indexes, len(found.tokens)) as journal:
        rows = _Run(model, meter, found, batch_size, per_pass, progress).all(variants, journal)
        result = _result(variants, rows, origin)
        result.save(target)
        journal.remove()
    return result


def _variants(model: TransformerBridge, make_edit: Any, heads: Any, offsets: Any) -> list[Variant]:
    anatomy = anatomies.read(model)
    if heads is None:
        every = itertools.product(range(anatomy.n_layers), range(anatomy.n_heads))
        wanted: Sequence[Head] = [Head(*at) for at in every]
    else:
        wanted = sorted(anatomy.require(heads))
        if not wanted:
            raise HeadError("no heads were given; expected at least one, or None for all")
    steps: Sequence[int | None] = [None] if offsets is None else anatomy.require_offsets(offsets)
    make = _maker(make_edit, offsets is not None)
    found = []
    for index, (head, offset) in enumerate(itertools.product(wanted, steps)):
        edit = make(head, offset)
        edit.validate(anatomy)
        found.append(Variant(index, head, offset, edit))
    tried = set()
    for one in found:
        # Layers may differ in what they take: find out before hours of work.
        if one.edit.layers not in tried and {"query", "key"} & set(one.edit.stages()):
            one.edit.prepare(model, anatomy)
        tried.add(one.edit.layers)
    return sorted(found, key=lambda one: (one.edit.layers[0], one.index))


def _maker(make_edit: Any, with_offset: bool) -> Callable[[Head, int | None], Edit]:
    if isinstance(make_edit, str):
        for field, needed in (("{head}", True), ("{offset}", with_offset)):
            if (field in make_edit) != needed:
                raise EditError(
                    f"expected a text {'with' if needed else 'without'} {field}, such as "
                    f"'KnockOut({{head}}, {'{offset}' if with_offset else 1})'; got {make_edit!r}"
                    + ("" if needed or with_offset else " (or give offsets)")
                )

        def from_text(head: Head, offset: int | None) -> Edit:
            return parse_edit(
                make_edit.replace("{head}", str(head)).replace("{offset}", str(offset))
            )

        return from_text
    if not callable(make_edit):
        raise EditError(
            f"expected a text such as 'KnockOut({{head}}, 1)' or a function of a head; got "
            f"{make_edit!r}"
        )

    arguments = (None, None) if with_offset else (None,)
    try:
        inspect.signature(make_edit).bind(*arguments)
    except TypeError:
        raise EditError(
            f"make_edit is called with a head{' and an offset' if with_offset else ''}, which "
            f"{make_edit!r} does not take"
        ) from None
    except ValueError:
        pass  # some builtins do not tell

    def from_function(head: Head, offset: int | None) -> Edit:
        made = make_edit(head, offset) if with_offset else make_edit(head)
        made = parse_edit(made) if isinstance(made, str) else made
        if not isinstance(made, Edit):
            raise EditError(f"make_edit gave {made!r} for {head}; expected an edit")
        return made

    return from_function


def _digest(variants: Sequence[Variant]) -> str:
    """Of the rows in order: which edit stands at which index."""
    listed = sorted(f"{one.index:09d} {one.head} {one.offset} {one.edit}" for one in variants)
    sha = hashlib.sha256("\n".join(listed).encode()).hexdigest()[:16]
    return f"{len(variants)} edits, {sha}"


class _Run:
    """The passes of a sweep over its prompts."""

    def __init__(
        self,
        model: TransformerBridge,
        meter: Meter,
        prompts: PromptSet,
        batch_size: int | None,
        per_pass: int | None,
        progress: bool | None,
    ) -> None:
        self.model, self.meter, self.progress = model, meter, progress
        self.todo = batches(prompts, model.cfg.d_vocab, batch_size, model.cfg.device)
        self.order = torch.cat([batch.index for batch in self.todo]).argsort()
        self.per_pass = per_pass or self._room()
        self.kept: list[Taken] = []

    def _room(self) -> int:
        """How many variants share a pass."""
        if torch.device(self.model.cfg.device).type == "cpu":
            return 1
        rows, n_pos = max((batch.tokens.shape for batch in self.todo), key=lambda s: s[0] * s[1])
        pattern = 4 * rows * self.meter.anatomy.n_heads * n_pos**2
        logits = 4 * rows * n_pos * self.model.cfg.d_vocab
        return max(1, _SHARED_BYTES // max(pattern, logits))

    def all(self, variants: list[Variant], journal: Journal | None) -> dict[int, list[float]]:
        """Each variant's values, by index; −1 is the intact model. The journal's are not run."""
        rows = {} if journal is None else journal.rows
        trunks = [Trunk(self.model, batch.tokens) for batch in self.todo]
        layers = {one.edit.layers[0] for one in variants}
        size = 4 * self.model.cfg.d_model * sum(batch.tokens.numel() for batch in self.todo)
        ahead = layers if len(layers) * size <= _AHEAD_BYTES else set()
        intact = []
        for trunk, batch in zip(trunks, self.todo, strict=True):
            with trunk.keeping(ahead):
                intact.append(self.meter.run(batch, None, Condition()))
        self.kept = [taken for _, taken in intact]
        if -1 not in rows:
            self._note(rows, journal, {-1: [values for (values,), _ in intact]})
        every = self._groups(variants)
        groups = [group for group in every if not all(one.index in rows for one in group)]
        sizes = [len(group) for group in groups]
        for group in progress_over(groups, "sweeping", show=self.progress, n=sizes):
            found: dict[int, list[Tensor]] = {one.index: [] for one in group}
            for trunk, batch, kept in zip(trunks, self.todo, self.kept, strict=True):
                trunk.advance(group[0].edit.layers[0])
                for one, values in zip(group, self._run(trunk, batch, kept, group), strict=True):
                    found[one.index].append(values)
            # Of a group that was cut in two, what had been written stays as it was.
            self._note(rows, journal, {i: v for i, v in found.items() if i not in rows})
        return rows

    def _note(
        self, rows: dict[int, list[float]], journal: Journal | None, found: dict[int, list[Tensor]]
    ) -> None:
        new = {}
        for index, parts in found.items():
            values = torch.cat(parts)[self.order]
            if values.shape[1] != 1:
                raise MetricError(
                    f"a sweep takes a metric with one number per prompt; {self.meter.names[0]} "
                    f"gives {values.shape[1]}"
                )
            new[index] = values[:, 0].tolist()
        if journal is None:
            rows.update(new)
        else:
            journal.write(new)

    def _groups(self, variants: list[Variant]) -> list[list[Variant]]:
        """Neighbours of one layer that can share a pass; always the same ones."""
        groups: list[list[Variant]] = []
        for one in variants:
            last = groups[-1] if groups else []
            shares = (
                0 < len(last) < self.per_pass
                and last[0].edit.layers == one.edit.layers
                and not any("key" in edit.stages() for edit in (last[0].edit, one.edit))
            )
            if shares:
                last.append(one)
            else:
                groups.append([one])
        return groups

    def _run(
        self, trunk: Trunk, batch: Batch, kept: Taken, group: list[Variant]
    ) -> list[Float[Tensor, "batch _"]]:
        """Values of each variant of a group on one batch."""
        n, size = len(group), len(batch.index)
        if n == 1:
            edits: list[Edit] = [group[0].edit]
        else:
            edits = [
                OnRows(one.edit.heads, one.edit, place * size, (place + 1) * size)
                for place, one in enumerate(group)
            ]
        what = group[0].edit if n == 1 else f"{group[0].edit} to {group[-1].edit}"
        with ExitStack() as stack:
            stack.enter_context(patch(self.model, *edits))
            stack.enter_context(trunk.stubbed(n))
            (values,), _ = self.meter.run(
                batch.repeated(n), kept.repeated(n), what, from_layer=trunk.layer
            )
        return list(values.split(size))


def _result(
    variants: list[Variant], rows: dict[int, list[float]], origin: dict[str, Any]
) -> Result:
    import pandas as pd

    ordered = sorted(variants, key=lambda one: one.index)
    after = torch.tensor([rows[one.index] for one in ordered], dtype=torch.float64).T
    before = torch.tensor(rows[-1], dtype=torch.float64)[:, None].expand_as(after)
    said = compared(before, after, origin["seed"], origin["confidence"])
    frame = pd.DataFrame(
        {
            "name": [str(one.head) for one in ordered],
            "layer": [one.head.layer for one in ordered],
            "head": [one.head.head for one in ordered],
            "offset": [one.offset for one in ordered],
            "edit": [str(one.edit) for one in ordered],
            "metric": origin["metric"],
            "n": len(before),
            **{name: values.numpy() for name, values in said.items()},
            "q": false_discovery(said["p"]).numpy(),
        }
    )
    if ordered[0].offset is None:
        frame = frame.drop(columns="offset")
    frame = frame.sort_values("effect", key=lambda e: -e.abs(), kind="stable")
    return Result("sweep", frame.reset_index(drop=True), provenance=origin)
