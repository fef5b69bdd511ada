"""What `check` found of a model: one row for each thing that was tried."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from ..data import display

if TYPE_CHECKING:
    import pandas as pd

#: What is promised, by the name of its rows.
CONTRACTS = {
    "hooks": "scores, pattern and z are where slashpatch takes them to be, and can be edited",
    "attention": "TransformerLens' attention equals the one of Transformers that it wraps",
    "q, k and RoPE": "queries, keys and the model's own frequencies reproduce its scores",
    "rows": "rows of attention sum to one, or to one minus the sink's share",
    "scores": "slash scores equal a direct mean over the pattern",
    "dtype": "values are finite, sums are of float64",
    "edits": "each edit changes the logits, and leaving it restores them bit for bit",
    "identities": "edits that say nothing change nothing",
    "cache": "with a KV cache as without one, under each edit",
    "padding": "padded on either side and in a batch as alone, under each edit",
    "fused": "the fused engine equals TransformerLens' own attention, under each edit",
}


@dataclass(frozen=True)
class Check:
    """One thing that was tried.

    Attributes:
        contract: Which of `CONTRACTS`; `subject` the edit, if one.
        status: "pass"; "refused": slashpatch says that it cannot do this here; "fail".
        detail: How close it was, or why.
    """

    contract: str
    subject: str
    status: str
    detail: str


@dataclass(frozen=True)
class Report:
    """The checks of one model, in order. `str` gives the table."""

    checks: tuple[Check, ...]
    provenance: dict[str, Any]

    @property
    def ok(self) -> bool:
        """Whether nothing failed; what is refused by name has not failed."""
        return not any(check.status == "fail" for check in self.checks)

    def status(self, contract: str) -> str:
        """What came of a contract as a whole.

        One of "fail" (of any check), "refused" (of all), "part" (refused in part), "pass", or "–"
        where none was made.
        """
        found = {check.status for check in self.checks if check.contract == contract}
        if not found:
            return "–"
        if "fail" in found:
            return "fail"
        return "part" if found == {"pass", "refused"} else found.pop()

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "ok": self.ok,
            "checks": [asdict(check) for check in self.checks],
            "contracts": CONTRACTS,
            "provenance": self.provenance,
        }

    def to_dataframe(self) -> pd.DataFrame:
        """One row a check."""
        import pandas as pd

        return pd.DataFrame([asdict(check) for check in self.checks])

    def __str__(self) -> str:
        return display.text(self)
