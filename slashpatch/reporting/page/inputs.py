"""What a report is made of: results or their files, checked to be of one model."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ...effects.result import Result
from ...errors import ReportError
from ...explaining.result import Explanation
from ...scanning.result import Scan
from ...scanning.top_keys_result import TopKeys
from .result_data import require_readable


@dataclass(frozen=True)
class Inputs:
    """The parts of a report, all of one model.

    Attributes:
        scan: The scan on natural text (or on the user's prompts).
        random: A scan of the same offsets on random tokens; None without one.
        explanations: Explanations, at most one of each head.
        results: Results of measure, flow, copying, paths and sweep.
        texts: Texts with the keys that their tokens attend to most.
    """

    scan: Scan
    random: Scan | None = None
    explanations: tuple[Explanation, ...] = ()
    results: tuple[Result, ...] = ()
    texts: tuple[TopKeys, ...] = ()

    @property
    def shape(self) -> tuple[int, int]:
        """Number of layers, and of heads of each layer."""
        n_layers, n_heads, _ = self.scan.sums.shape
        return n_layers, n_heads


def gather(
    scan: Any,
    random: Any = None,
    explanations: Any = (),
    results: Any = (),
    texts: Any = (),
) -> Inputs:
    """Return the parts of a report; each may be an object or the path of a saved one.

    Raises ReportError for an object of another class, or of another model than the scan; and what
    the classes' `load` raise for files that are missing or damaged.
    """
    if scan is None:
        raise ReportError("a report needs a scan: pass scan=, a Scan or the file of a saved one")
    found = Inputs(
        _loaded(scan, Scan, "scan"),
        None if random is None else _loaded(random, Scan, "random"),
        tuple(_all_loaded(explanations, Explanation, "explanations")),
        tuple(_all_loaded(results, Result, "results")),
        tuple(_all_loaded(texts, TopKeys, "texts")),
    )
    _require_one_model(found)
    if found.random is not None and found.random.offsets != found.scan.offsets:
        raise ReportError(
            "the scan on random tokens must have the offsets of the other scan, "
            f"{_short(found.scan.offsets)}; got {_short(found.random.offsets)}"
        )
    if found.random is not None and _prompts(found.random) == _prompts(found.scan):
        raise ReportError(
            "random= is a scan of the same prompts as scan=; expected one of other tokens, such as "
            "sp.scan(model, random_tokens=True)"
        )
    explained = [explanation.head for explanation in found.explanations]
    for head in explained:
        if explained.count(head) > 1:
            raise ReportError(f"there are several explanations of {head}; give one of each head")
    for index, result in enumerate(found.results):
        require_readable(result, found.shape, f"results[{index}]")
    for explanation in found.explanations:
        n_layers, n_heads = found.shape
        if explanation.head.layer >= n_layers or explanation.head.head >= n_heads:
            raise ReportError(
                f"an explanation is of {explanation.head}, and the scan is of {n_layers} layers of "
                f"{n_heads} heads"
            )
    return found


def _all_loaded(given: Any, kind: type, name: str) -> Iterable[Any]:
    """Yield each of several objects or paths; a single one counts as one."""
    if isinstance(given, (kind, str, os.PathLike)):
        given = [given]
    if not isinstance(given, Iterable):
        raise ReportError(f"{name} must be several of {kind.__name__}; got {given!r}")
    for index, one in enumerate(given):
        yield _loaded(one, kind, f"{name}[{index}]")


def _loaded(given: Any, kind: Any, name: str) -> Any:
    if isinstance(given, (str, os.PathLike)):
        return kind.load(given)
    if not isinstance(given, kind):
        raise ReportError(
            f"{name} must be a {kind.__name__} or the file of a saved one; got "
            f"{type(given).__name__}"
        )
    return given


def _require_one_model(found: Inputs) -> None:
    """Raise ReportError unless all parts have the scan's weights."""
    origin = found.scan.provenance
    for name, part in parts(found):
        other = part.provenance
        if other.get("fingerprint") != origin["fingerprint"]:
            raise ReportError(
                f"{name} is of another model than the scan: {_model(other)} and {_model(origin)}; "
                "a report is of one model"
            )


def _prompts(scan: Scan) -> list[Any]:
    return [part.get("digest") for part in scan.provenance["prompts"]]


def parts(found: Inputs) -> list[tuple[str, Any]]:
    """Return (name, object) of everything that a report is made of."""
    named: list[tuple[str, Any]] = [("the scan", found.scan)]
    if found.random is not None:
        named.append(("the scan on random tokens", found.random))
    named += [(f"the explanation of {part.head}", part) for part in found.explanations]
    named += [(f"results[{i}] ({part.kind})", part) for i, part in enumerate(found.results)]
    named += [(f"texts[{i}]", part) for i, part in enumerate(found.texts)]
    return named


def _model(origin: dict[str, Any]) -> str:
    return f"{origin.get('model')} (weights {str(origin.get('fingerprint'))[:12]})"


def _short(offsets: Sequence[int]) -> str:
    return f"{len(offsets)} from {offsets[0]} to {offsets[-1]}"
