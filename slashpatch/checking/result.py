"""The report of `check`: one row for each check."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from ..data import display

if TYPE_CHECKING:
    import pandas as pd

#: What slashpatch promises of a model, by contract.
CONTRACTS = {
    "hooks": "the hooks on scores, pattern and z carry these tensors, and can edit them",
    "attention": "TransformerLens' attention equals the Transformers attention that it wraps",
    "q, k and RoPE": "queries, keys and RoPE frequencies reproduce the model's scores",
    "rows": "rows of the pattern sum to one, or to one minus the attention sink's share",
    "scores": "slash scores of a scan equal a direct mean over the pattern",
    "dtype": "logits are finite, and sums are in float64",
    "edits": "each edit changes the logits, and leaving its patch restores them bit for bit",
    "identities": "edits that are identities do not change the logits",
    "cache": "logits with a KV cache equal those without, under each edit",
    "padding": "logits of a padded prompt equal those of the prompt alone, under each edit",
    "fused": "the fused engine equals TransformerLens' own attention, under each edit",
}


@dataclass(frozen=True)
class Check:
    """One check of a contract.

    Attributes:
        contract: A key of `CONTRACTS`.
        subject: The edit that was tried, "no edit", or "" for checks without edits.
        status: "pass", "fail", or "refused" if slashpatch does not support this on the model.
        detail: How large the differences were, or why the check failed or was refused.
    """

    contract: str
    subject: str
    status: str
    detail: str


@dataclass(frozen=True)
class Report:
    """All checks of one model, in order. `str` gives a table."""

    checks: tuple[Check, ...]
    provenance: dict[str, Any]

    @property
    def ok(self) -> bool:
        """Whether no check failed; a refused check has not failed."""
        return not any(check.status == "fail" for check in self.checks)

    def status(self, contract: str) -> str:
        """Return the status of a contract over all its checks.

        "fail" if any check failed, "refused" if all were refused, "part" if only some were refused,
        "pass" if all passed, "–" if there was none.
        """
        statuses = {check.status for check in self.checks if check.contract == contract}
        if not statuses:
            return "–"
        if "fail" in statuses:
            return "fail"
        return "part" if statuses == {"pass", "refused"} else statuses.pop()

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain JSON values."""
        return {
            "ok": self.ok,
            "checks": [asdict(check) for check in self.checks],
            "contracts": CONTRACTS,
            "provenance": self.provenance,
        }

    def to_dataframe(self) -> pd.DataFrame:
        """Return a table with one row per check."""
        import pandas as pd

        return pd.DataFrame([asdict(check) for check in self.checks])

    def plot(self, backend: str = "matplotlib") -> Any:
        """Return the number of checks by outcome, as a matplotlib figure or ("altair") a chart.

        Raises PlotError for another backend, ExtraError if Altair is not installed.
        """
        return display.plot(self, backend)

    def _repr_html_(self) -> str:
        return display.html(self)

    def __str__(self) -> str:
        return display.text(self)
