"""The result of measure, flow, copying, paths, activation_patching, direct_effect and others."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data import display
from ..data.files import DAMAGED, load_json, said, write_json, write_table
from ..errors import OutputError

if TYPE_CHECKING:
    import pandas as pd

#: File formats that store the provenance as well.
SUFFIXES = (".parquet", ".json")
_WHAT = "a result that slashpatch saved"


@dataclass(frozen=True)
class Result:
    """Measured effects, with their provenance.

    Attributes:
        kind: "measure", "flow", "copying", "paths", "pairs" (of activation_patching), "direct",
            "persistence", "sweep", "screen", "dose" or "circuit".
        frame: The main table.
        tables: Further tables by name.
        remarks: Findings in words.
        provenance: Model, edits, prompts, seed, versions.
    """

    kind: str
    frame: pd.DataFrame
    tables: dict[str, pd.DataFrame] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()
    provenance: dict[str, Any] = field(default_factory=dict)

    def to_dataframe(self) -> pd.DataFrame:
        """Return the main table, with the provenance in `attrs`, which .parquet files keep."""
        frame = self.frame.copy()
        frame.attrs = {"slashpatch": self.kind, "provenance": self.provenance}
        return frame

    def to_dict(self) -> dict[str, Any]:
        """Return all tables, remarks and the provenance as plain JSON values."""
        tables = {"effects": self.frame, **self.tables}
        return {
            "kind": self.kind,
            "remarks": list(self.remarks),
            **{name: table.to_dict(orient="records") for name, table in tables.items()},
            "provenance": self.provenance,
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a .json file (everything) or a .parquet file (the main table and the provenance).

        Raises OutputError for another suffix, or if the file cannot be written.
        """
        if Path(path).suffix == ".parquet":
            write_table(self.to_dataframe(), path)
        elif Path(path).suffix == ".json":
            write_json(path, self.to_dict())
        else:
            raise OutputError(
                f"cannot write {str(path)!r}: expected one of {', '.join(SUFFIXES)}, which keep "
                "the provenance; for other formats use to_dataframe()"
            )

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Result:
        """Load what `save` wrote; a .parquet file holds no further tables and no remarks.

        Raises OutputError.
        """
        import pandas as pd

        if Path(path).suffix == ".parquet" and Path(path).is_file():
            try:
                frame = pd.read_parquet(path)
                attrs, frame.attrs = frame.attrs, {}
                return _checked(cls(attrs["slashpatch"], frame, provenance=attrs["provenance"]))
            except DAMAGED as why:
                raise OutputError(f"{str(path)!r} is not {_WHAT}: {said(why)}") from None
        result: Result = load_json(path, _from_record, _WHAT)
        return result

    def plot(self, backend: str = "matplotlib", *, top: int = 20) -> Any:
        """Return the effects, as a matplotlib figure or ("altair") a chart.

        Of `measure`, a forest plot for each metric, with single draws of the controls; of `paths`,
        the strongest. `top` is the most rows of these. Raises PlotError for another backend or no
        rows, ExtraError if Altair is not installed.
        """
        return display.plot(self, backend, top=top)

    def _repr_html_(self) -> str:
        return display.html(self)


def _from_record(record: dict[str, Any]) -> Result:
    """Return the result whose `to_dict` a file holds. Raises as bad JSON values do."""
    import pandas as pd

    kind, remarks, origin = (record.pop(name) for name in ("kind", "remarks", "provenance"))
    if not isinstance(remarks, list) or not all(isinstance(text, str) for text in remarks):
        raise TypeError("its remarks are no texts")
    if not all(isinstance(row, dict) for rows in record.values() for row in rows):
        raise TypeError("its tables are no rows with named columns")
    frames = {name: _numbers(pd.DataFrame(rows)) for name, rows in record.items()}
    return _checked(Result(kind, frames.pop("effects"), frames, tuple(remarks), origin))


def _checked(result: Result) -> Result:
    """Return the result. Raises TypeError unless its kind is a text, its provenance a dict."""
    if not isinstance(result.kind, str) or not isinstance(result.provenance, dict):
        raise TypeError("its kind is no text, or its provenance holds no names")
    return result


def _numbers(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the table with NaN for the nulls of JSON in columns of numbers."""
    import pandas as pd

    for name in frame.columns:
        values = frame[name]
        if values.dtype == object and all(v is None or isinstance(v, (int, float)) for v in values):
            frame[name] = pd.to_numeric(values)
    return frame
