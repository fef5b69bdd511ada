"""The record of a run in progress: its rows, and the file that is written whole at each step."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..bridge.provenance import provenance
from ..data.files import require_writable
from ..errors import EmergenceError
from .emergence_result import Emergence, columns_of, require_parquet, require_same_run

if TYPE_CHECKING:
    import pandas as pd
    from transformer_lens.model_bridge import TransformerBridge

    from .probe import Probe


class Record:
    """Rows by step. The file always holds all finished steps: a killed run loses none.

    Args:
        probe: What is measured; a file of another probe is refused.
        model: One model of the run.
        path: A .parquet file, or None.
        existing: What becomes of a file that exists: "refuse" it, "continue" it (its rows are
            kept), or "replace" it (if it is such a file; with the first write).
        details: Further values of the header.
    """

    def __init__(
        self,
        probe: Probe,
        model: TransformerBridge,
        path: str | os.PathLike[str] | None = None,
        existing: str = "refuse",
        **details: Any,
    ) -> None:
        self.probe = probe
        self.path = None if path is None else Path(path)
        header = provenance(model, **probe.header, **details)
        del header["fingerprint"]  # each step has its own
        self.header = header
        self.rows: dict[int, pd.DataFrame] = {}
        if self.path is None:
            return
        require_file(self.path)
        require_new(self.path, existing)
        if not self.path.exists():
            return
        found = Emergence.load(self.path)
        if existing == "replace":
            return
        require_same_run(found.provenance, header, self.path)
        self.header = {**found.provenance, "versions": header["versions"]}
        for step in found.steps:
            self.rows[step] = found.frame[found.frame["step"] == step]

    def keep(self, steps: Iterable[int]) -> None:
        """Forget all other steps; the file follows with the next `write`."""
        wanted = set(steps)
        self.rows = {step: rows for step, rows in self.rows.items() if step in wanted}

    def add(
        self, step: int, checkpoint: str, model: TransformerBridge, loss: float | None = None
    ) -> None:
        """Measure the model and write the file. Rows of the same step are replaced.

        Raises what `Probe.measure` raises, and OutputError if the file cannot be written.
        """
        frame, fingerprint = self.probe.measure(model)
        nan = float("nan")
        known: dict[str, Any] = {
            "step": step,
            "checkpoint": checkpoint,
            "fingerprint": fingerprint,
            "loss": nan if loss is None else loss,
            "eval_loss": nan,
        }
        for name, value in reversed(known.items()):
            frame.insert(0, name, value)
        self.rows[step] = frame[columns_of(self.probe.offsets, self.probe.measures)]
        self.write()

    def note(self, column: str, value: float, steps: Iterable[int]) -> None:
        """Set a loss that became known later; the file follows with the next `write`."""
        for step in steps:
            self.rows[step] = self.rows[step].assign(**{column: value})

    def write(self) -> None:
        """Write the file. Raises OutputError."""
        if self.path is not None and self.rows:
            self.result.save(self.path)

    @property
    def result(self) -> Emergence:
        """All steps so far."""
        import pandas as pd

        columns = columns_of(self.probe.offsets, self.probe.measures)
        frames = [self.rows[step] for step in sorted(self.rows)]
        frame = pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=columns)
        return Emergence(frame, self.header)


def require_file(path: str | os.PathLike[str] | None) -> None:
    """Raise EmergenceError or OutputError for a path that cannot become a .parquet file."""
    if path is not None:
        require_parquet(path)
        require_writable(path)


def require_new(path: str | os.PathLike[str] | None, existing: str) -> None:
    """Raise EmergenceError for a file that exists, if `existing` is "refuse"."""
    if path is not None and existing == "refuse" and os.path.exists(path):
        raise EmergenceError(
            f"{os.fspath(path)!r} holds a run already; resume it (--resume, resume=True, "
            "resume_from_checkpoint), choose another file, or delete this one to start again"
        )
