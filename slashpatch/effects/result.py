"""The result of measure, flow, copying, paths and sweep: tables, remarks and provenance."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data import display
from ..data.files import without_nan, write_table, written_whole
from ..errors import OutputError

if TYPE_CHECKING:
    import pandas as pd

#: File formats that store the provenance as well.
SUFFIXES = (".parquet", ".json")


@dataclass(frozen=True)
class Result:
    """Measured effects, with their provenance.

    Attributes:
        kind: "measure", "flow", "copying", "paths" or "sweep".
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
            with written_whole(path) as file:
                text = json.dumps(without_nan(self.to_dict()), ensure_ascii=False, indent=1)
                file.write_text(text, encoding="utf-8")
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

        try:
            if Path(path).suffix == ".parquet":
                frame = pd.read_parquet(path)
                attrs = frame.attrs
                kind, origin, frame.attrs = attrs["slashpatch"], attrs["provenance"], {}
                return cls(kind, frame, provenance=origin)
            record = json.loads(Path(path).read_text(encoding="utf-8"))
            remarks, origin = tuple(record.pop("remarks")), record.pop("provenance")
            kind = record.pop("kind")
            frames = {name: _numbers(pd.DataFrame(rows)) for name, rows in record.items()}
            return cls(kind, frames.pop("effects"), frames, remarks, origin)
        except FileNotFoundError:
            raise OutputError(f"no file {str(path)!r}") from None
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise OutputError(
                f"{str(path)!r} is not a result that slashpatch saved: {type(error).__name__}"
            ) from None

    def plot(self, backend: str = "matplotlib", *, top: int = 20) -> Any:
        """Return the effects, as a matplotlib figure or ("altair") a chart.

        Of `measure`, a forest plot for each metric, with single draws of the controls; of `paths`,
        the strongest. `top` is the most rows of these. Raises PlotError for another backend or no
        rows, ExtraError if Altair is not installed.
        """
        return display.plot(self, backend, top=top)

    def _repr_html_(self) -> str:
        return display.html(self)


def _numbers(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the table with NaN for the nulls of JSON in columns of numbers."""
    import pandas as pd

    for name in frame.columns:
        values = frame[name]
        if values.dtype == object and all(v is None or isinstance(v, (int, float)) for v in values):
            frame[name] = pd.to_numeric(values)
    return frame
