"""The claims about one model with their tests and verdicts, as tables and as a file."""

from __future__ import annotations

import math
import os
from copy import deepcopy
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data import display
from ..data.files import load_json, write_json, written_whole
from ..errors import OutputError
from .measured import Measured
from .rules import CLAIMS, RULES
from .verdicts import outcome, verdict

if TYPE_CHECKING:
    import pandas as pd

#: What `Evidence.save` writes.
SUFFIXES = (".json", ".md", ".html")
_FORMAT = "slashpatch-evidence-1"
_NUMBERS = ("estimate", "low", "high", "control", "p_rank")


@dataclass(frozen=True, eq=False)
class Evidence:
    """What was measured for the claims of arXiv 2601.08297 on one model; `str` gives the table.

    Attributes:
        measured: The numbers of each test, in the order of the claims.
        provenance: Model, prompts, settings, seed, versions, machine.
    """

    measured: tuple[Measured, ...]
    provenance: dict[str, Any]

    @property
    def frame(self) -> pd.DataFrame:
        """A row per claim: `claim` (its number), `name`, `verdict`, `why`, and its first test.

        `test`, `estimate`, `low`, `high` and `n` are of the test that decided: the first one that
        contradicts the claim or leaves it open, else the first that the claim needs.
        """
        import pandas as pd

        rows = []
        for claim in CLAIMS:
            came, why = self.verdict(claim.number)
            row: dict[str, Any] = {
                "claim": claim.number,
                "name": claim.name,
                "verdict": came,
                "why": why,
            }
            deciding = self._deciding(claim.number, came)
            row["test"] = deciding.test
            row.update({key: getattr(deciding, key) for key in ("estimate", "low", "high", "n")})
            rows.append(row)
        return pd.DataFrame(rows)

    @property
    def tests(self) -> pd.DataFrame:
        """A row per test: its claim, question, numbers, control, rule and outcome."""
        import pandas as pd

        return pd.DataFrame([self._test(test) for test in self.measured])

    def verdict(self, claim: int) -> tuple[str, str]:
        """Return a claim's verdict by its rules, and the reason if it is open."""
        return verdict(claim, list(self.measured))

    def of_claim(self, claim: int) -> list[Measured]:
        """Return the tests of a claim, in the order of the rules."""
        found = {test.test: test for test in self.measured}
        return [
            found[name] for name, rule in RULES.items() if rule.claim == claim and name in found
        ]

    def _deciding(self, claim: int, came: str) -> Measured:
        tests = [test for test in self.of_claim(claim) if RULES[test.test].needed]
        same = [test for test in tests if outcome(test)[0] == came]
        return (same or tests or [Measured(next(n for n, r in RULES.items() if r.claim == claim))])[
            0
        ]

    @staticmethod
    def _test(test: Measured) -> dict[str, Any]:
        rule = RULES[test.test]
        came, why = outcome(test)
        return {
            "claim": rule.claim,
            "test": test.test,
            "question": rule.question,
            "estimate": test.estimate,
            "low": test.low,
            "high": test.high,
            "unit": rule.unit,
            "n": test.n,
            "against": rule.control,
            "control": test.control,
            "draws": test.draws,
            "p_rank": test.p_rank,
            "rule": str(rule),
            "needed": rule.needed,
            "outcome": came,
            "why": why,
            "detail": test.detail,
        }

    def to_dict(self) -> dict[str, Any]:
        """Return claims, verdicts, tests and provenance as plain JSON values."""
        claims = []
        for claim in CLAIMS:
            came, why = self.verdict(claim.number)
            claims.append(
                {
                    "claim": claim.number,
                    "name": claim.name,
                    "says": claim.says,
                    "verdict": came,
                    "why": why,
                    "tests": [self._test(test) for test in self.of_claim(claim.number)],
                }
            )
        return {"format": _FORMAT, "claims": claims, "provenance": deepcopy(self.provenance)}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a .json file, which `load` reads, or a page as .html or .md. Raises OutputError."""
        suffix = Path(path).suffix
        if suffix not in SUFFIXES:
            raise OutputError(
                f"cannot write {str(path)!r}: expected a name that ends in {', '.join(SUFFIXES)}"
            )
        if suffix == ".json":
            write_json(path, self.to_dict())
            return
        text = display.text(self, page=suffix[1:])
        with written_whole(path) as file:
            file.write_text(text, encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Evidence:
        """Load what `save` wrote as .json; verdicts follow from the rules again.

        Raises OutputError for any other file.
        """

        def build(record: dict[str, Any]) -> Evidence:
            if record["format"] != _FORMAT:
                raise ValueError(f"its format is {record['format']}, expected {_FORMAT}")
            tests = [test for claim in record["claims"] for test in claim["tests"]]
            return cls(tuple(map(measured_from, tests)), dict(record["provenance"]))

        found: Evidence = load_json(path, build, "evidence that slashpatch saved")
        return found

    def plot(self, backend: str = "matplotlib") -> Any:
        """Return a matplotlib figure: each test's interval against its threshold.

        Raises PlotError for any other backend.
        """
        return display.plot(self, backend)

    def __str__(self) -> str:
        return display.text(self)

    def _repr_html_(self) -> str:
        return display.html(self)


def measured_from(record: dict[str, Any]) -> Measured:
    """Return the numbers of a test from its record. Raises ValueError for any other record."""
    known = {field.name for field in fields(Measured)} - {"why_not"}
    values = {key: value for key, value in record.items() if key in known}
    if values.get("test") not in RULES:
        raise ValueError(f"there is no test {values.get('test')!r}")
    for key in _NUMBERS:
        value = values.get(key)
        if value is not None and type(value) not in (int, float):
            raise ValueError(f"{key} of {values['test']!r} is no number: {value!r}")
        values[key] = math.nan if value is None else float(value)
    for key in ("n", "draws"):
        if type(values[key]) is not int:
            raise ValueError(f"{key} of {values['test']!r} is no integer: {values[key]!r}")
    why_not = record["why"] if math.isnan(values["estimate"]) else ""
    return Measured(**{**values, "detail": str(values.get("detail", "")), "why_not": str(why_not)})
