"""The result of measuring one model at several steps of its training."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..data import display
from ..data.files import load_frame, save_frame
from ..errors import EmergenceError
from .probe import MEASURES, score_columns
from .result import require_kappa

if TYPE_CHECKING:
    import pandas as pd

_FORMAT = "slashpatch-emergence-1"
#: Columns that are the same for all heads of a step.
STEP_COLUMNS = ("step", "checkpoint", "fingerprint", "loss", "eval_loss")
_HEAD_COLUMNS = ("layer", "head", "name")


@dataclass(frozen=True, eq=False)
class Emergence:
    """Slash scores of every head over the steps of training, measured on the same prompts.

    Attributes:
        frame: A row for each step and head. Columns: step, checkpoint (its name), fingerprint (of
            the weights), loss and eval_loss (as the Trainer logged them, else NaN), layer, head,
            name, `score_Δ` for each offset, and the columns of the measures: r1_q, r1_k; cone_q,
            cone_k, cone_x; band_high, band_medium, band_low; prefix_matching; copying_loss.
        provenance: What was measured: model, offsets, measures, prompts, versions.
    """

    frame: pd.DataFrame
    provenance: dict[str, Any]

    @property
    def offsets(self) -> tuple[int, ...]:
        """Offsets Δ of the slash scores."""
        return tuple(self.provenance["offsets"])

    @property
    def measures(self) -> tuple[str, ...]:
        """Names of what was measured, "slash" first."""
        return tuple(self.provenance["measures"])

    @property
    def steps(self) -> tuple[int, ...]:
        """Measured steps, ascending."""
        return tuple(int(step) for step in self.frame["step"].unique())

    @property
    def scores(self) -> Float[Tensor, "step layer head offset"]:
        """Slash scores: mean attention i → i−Δ of each prompt, averaged over prompts."""
        n_layers, n_heads, _ = self.provenance["layers_heads_vocabulary"]
        values = self.frame[score_columns(self.offsets)].to_numpy()
        return torch.tensor(values).reshape(-1, n_layers, n_heads, len(self.offsets))

    def best(self, min_offset: int = 0) -> pd.DataFrame:
        """Return each head's highest score at each step: step, layer, head, name, offset, score.

        Offsets below `min_offset` are left out. Raises EmergenceError if none is left.
        """
        offsets = [offset for offset in self.offsets if offset >= min_offset]
        if not offsets:
            raise EmergenceError(
                f"no measured offset is {min_offset} or more; the highest is {self.offsets[-1]}"
            )
        scores = self.frame[score_columns(offsets)].fillna(-1).to_numpy()
        found = self.frame[["step", *_HEAD_COLUMNS]].copy()
        found["offset"] = [offsets[column] for column in scores.argmax(-1)]
        found["score"] = scores.max(-1)
        return found

    def slash_heads(self, kappa: float = 0.1, min_offset: int = 0) -> pd.DataFrame:
        """Return the rows of `best` whose score is at least κ, the highest first in each step.

        κ = 0.1 is *ours*. Uniform attention over a prompt of T tokens scores about log(T)/T at
        every offset, so short prompts need a higher one. Raises ScanError for κ outside [0, 1].
        """
        require_kappa(kappa)
        found = self.best(min_offset)
        reached = found[found["score"] >= kappa]
        return reached.sort_values(
            ["step", "score"], ascending=[True, False], ignore_index=True, kind="stable"
        )

    def first_steps(self, kappa: float = 0.1, column: str | None = None) -> pd.DataFrame:
        """Return when each head first reached κ, the earliest first; a row for each that did.

        Args:
            kappa: The threshold, from 0 to 1.
            column: A column of the frame, such as prefix_matching; None for slash scores, which
                give a row for each head and offset.

        Returns:
            Columns layer, head, name, offset (−1 for other columns), `first` (the step), `before`
            (the last measured step before it, −1 if none: the head crossed in between), `since`
            (from which it stayed until the last step, −1 if it fell below again), highest, last.

        Raises:
            ScanError: κ outside [0, 1].
            EmergenceError: A column that was not measured.
        """
        import pandas as pd

        require_kappa(kappa)
        names = {f"score_{offset}": offset for offset in self.offsets}
        if column is not None:
            known = [name for measure in self.measures for name in MEASURES[measure]]
            if column not in (*known, *names):
                raise EmergenceError(
                    f"no column {column!r} was measured; expected one of "
                    f"{', '.join((*known, *names))}"
                )
            names = {column: names.get(column, -1)}
        steps = self.steps
        rows = []
        for head, group in self.frame.groupby(list(_HEAD_COLUMNS), sort=False):
            for name, offset in names.items():
                values = group[name].to_numpy()
                above = values >= kappa
                if not above.any():
                    continue
                first = int(above.argmax())
                below = (~above).nonzero()[0]
                since = 0 if len(below) == 0 else int(below[-1]) + 1
                rows.append(
                    {
                        **dict(zip(_HEAD_COLUMNS, head, strict=True)),
                        "offset": offset,
                        "before": steps[first - 1] if first else -1,
                        "first": steps[first],
                        "since": steps[since] if since < len(steps) else -1,
                        "highest": float(values.max()),
                        "last": float(values[-1]),
                    }
                )
        columns = [*_HEAD_COLUMNS, "offset", "before", "first", "since", "highest", "last"]
        found = pd.DataFrame(rows, columns=columns)
        return found.sort_values(
            ["first", "highest"], ascending=[True, False], ignore_index=True, kind="stable"
        )

    def summary(self, kappa: float = 0.1) -> pd.DataFrame:
        """Return a row for each step: step, checkpoint, losses, how many heads reach κ at some
        offset, and the highest slash score with its head and offset; also the highest prefix
        matching with its head, and the copying loss, where these were measured.
        """
        require_kappa(kappa)
        best = self.best()
        rows = self.frame.drop_duplicates("step")[[*STEP_COLUMNS]].reset_index(drop=True)
        by_step = best.groupby("step", sort=False)
        top = best.loc[by_step["score"].idxmax()].reset_index(drop=True)
        reached = best["score"].ge(kappa).groupby(best["step"], sort=False).sum()
        rows["slash_heads"] = reached.to_numpy()
        rows[["head", "offset", "score"]] = top[["name", "offset", "score"]]
        for measure in set(self.measures) & {"prefix", "copying"}:
            column = MEASURES[measure][0]
            # pandas refuses a step of which all values are NaN, as where the logits overflow.
            known = self.frame[column].fillna(-float("inf"))
            at = known.groupby(self.frame["step"], sort=False).idxmax()
            rows[column] = self.frame.loc[at, column].to_numpy()
            if measure == "prefix":
                rows["prefix_head"] = self.frame.loc[at, "name"].to_numpy()
        return rows.drop(columns="fingerprint")

    def table(self, kappa: float = 0.1) -> str:
        """Return the steps, and when each head reached κ, as plain text."""
        return display.text(self, kappa=kappa)

    def plot(
        self, backend: str = "matplotlib", *, kappa: float = 0.1, log_steps: bool = False
    ) -> Any:
        """Return each head's score over steps, and the other measures, as a figure or a chart.

        Heads that reach κ are coloured. `log_steps` gives a logarithmic axis of steps. Raises
        PlotError for another backend, ExtraError if Altair is not installed.
        """
        return display.plot(self, backend, kappa=kappa, log_steps=log_steps)

    def _repr_html_(self) -> str:
        return display.html(self)

    def __str__(self) -> str:
        return self.table()

    def __repr__(self) -> str:
        n_layers, n_heads, _ = self.provenance["layers_heads_vocabulary"]
        return (
            f"<Emergence of {self.provenance['model']}: {len(self.steps)} steps, "
            f"{n_layers} × {n_heads} heads, {', '.join(self.measures)}>"
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a .parquet file, whole or not at all, which pandas reads too.

        Raises EmergenceError for another suffix, OutputError if the file cannot be written.
        """
        require_parquet(path)
        save_frame(path, {"format": _FORMAT, "provenance": self.provenance}, self.frame)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Emergence:
        """Read a file that `save`, `emergence` or `SlashCallback` wrote.

        Raises EmergenceError for any other file.
        """

        def build(header: dict[str, Any], frame: pd.DataFrame) -> Emergence:
            found = cls(frame, dict(header["provenance"]))
            found._validate()
            return found

        found: Emergence = load_frame(path, _FORMAT, build, EmergenceError)
        return found

    def _validate(self) -> None:
        """Raise EmergenceError unless rows and columns are those that the header promises."""
        n_layers, n_heads, _ = self.provenance["layers_heads_vocabulary"]
        expected = columns_of(self.offsets, self.measures)
        heads = [(layer, head) for layer in range(n_layers) for head in range(n_heads)]
        steps = self.steps
        found = list(zip(self.frame["layer"], self.frame["head"], strict=True))
        if (
            list(self.frame.columns) != expected
            or found != heads * len(steps)
            or list(steps) != sorted(set(steps))
            or self.frame["step"].tolist() != [step for step in steps for _ in heads]
        ):
            raise EmergenceError("its rows or columns do not agree with its header")


def columns_of(offsets: tuple[int, ...], measures: tuple[str, ...]) -> list[str]:
    """Return all columns of `Emergence.frame`."""
    measured = [name for measure in measures for name in MEASURES[measure]]
    return [*STEP_COLUMNS, *_HEAD_COLUMNS, *score_columns(offsets), *measured]


def require_parquet(path: str | os.PathLike[str]) -> None:
    """Raise EmergenceError for a path with another suffix."""
    if Path(path).suffix != ".parquet":
        raise EmergenceError(f"this is saved as a .parquet file; got {os.fspath(path)!r}")


def require_same_run(before: Mapping[str, Any], now: Mapping[str, Any], path: Any) -> None:
    """Raise EmergenceError if a file's header is of another run or probe; it says what differs."""
    shape = ("architecture", "layers_heads_vocabulary")
    for key in (*shape, "dtype", "edits", "offsets", "measures", "prompts"):
        if before.get(key) != now.get(key):
            raise EmergenceError(
                f"{os.fspath(path)!r} is of another run: its {key} is {before.get(key)!r}, here it "
                f"is {now.get(key)!r}; choose another file, or delete this one"
            )
    if before.get("repeats") != now.get("repeats"):
        raise EmergenceError(
            f"{os.fspath(path)!r} was measured on other repeated random tokens; give the same "
            "seed and n_prompts, or choose another file"
        )
