"""The file of a scan: its tensors, and a header, as .safetensors."""

from __future__ import annotations

import operator
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..data.files import load_tensors, save_tensors
from ..errors import ScanError
from ..maths.offsets import as_offsets
from .lines import line_sums_from
from .moments import Moments

if TYPE_CHECKING:
    from .result import Scan

#: The newest format, which is written, and all that can be read; the third has no lines.
_FORMATS = ("slashpatch-scan-4", "slashpatch-scan-3")


def write_scan(scan: Scan, path: str | os.PathLike[str]) -> None:
    """Write a scan as a .safetensors file. Raises ScanError for another suffix, or OutputError."""
    if Path(path).suffix != ".safetensors":
        raise ScanError(f"a scan is saved as a .safetensors file; got {str(path)!r}")
    header = {
        "format": _FORMATS[0],
        "offsets": list(scan.offsets),
        "n_tokens": scan.n_tokens,
        "provenance": scan.provenance,
    }
    tensors = {"sums": scan.sums, "squares": scan.squares, "counts": scan.counts}
    if scan.moments is not None:
        header["pairing"] = list(scan.moments.pairing)
        tensors |= {f"moments.{name}": t for name, t in scan.moments.tensors().items()}
    if scan.line_sums is not None:
        header["lines"] = {"window": scan.line_sums.window, "gap": scan.line_sums.gap}
        tensors |= {f"lines.{name}": t for name, t in scan.line_sums.tensors().items()}
    save_tensors(path, header, tensors)


def read_scan(path: str | os.PathLike[str], kind: type[Scan]) -> Any:
    """Return the scan in a file that `write_scan` wrote. Raises ScanError for any other file."""

    def build(header: dict[str, Any], tensors: dict[str, Tensor]) -> Scan:
        moments = {
            name.removeprefix("moments."): tensor
            for name, tensor in tensors.items()
            if name.startswith("moments.")
        }
        scan = kind(
            as_offsets(header["offsets"]),
            tensors["sums"],
            tensors["squares"],
            tensors["counts"],
            operator.index(header["n_tokens"]),
            dict(header["provenance"]),
            Moments(**moments, pairing=tuple(header["pairing"])) if moments else None,
            line_sums_from(header, tensors),
        )
        _validate(scan, header["offsets"])
        return scan

    return load_tensors(path, _FORMATS, build, ScanError)


def _validate(scan: Scan, written: Any) -> None:
    """Raise ScanError unless shapes, dtypes and offsets agree with each other."""
    shape = (*scan.sums.shape[:2], len(scan.offsets))
    valid = (
        list(scan.offsets) == list(written)
        and scan.sums.shape == scan.squares.shape == shape
        and scan.counts.shape == shape[-1:]
        and scan.sums.dtype == scan.squares.dtype == torch.float64
        and scan.counts.dtype == torch.int64
        and bool(scan.sums.isfinite().all() & scan.squares.isfinite().all())
        and bool((scan.counts >= 1).all())
        and _moments_agree(scan)
        and (scan.line_sums is None or scan.line_sums.fits(*shape[:2]))
        and {"model", "fingerprint", "dtype", "edits", "prompts"} <= set(scan.provenance)
    )
    if not valid:
        raise ScanError("its shapes, dtypes or offsets do not agree with each other")


def _moments_agree(scan: Scan) -> bool:
    """Return whether the shapes of the moments agree with the scores."""
    if scan.moments is None:
        return True
    m = scan.moments
    n_layers, n_heads, _ = scan.sums.shape
    d_head, n_offsets = m.sum_q.shape[-1], m.logits.shape[-1]
    return (
        m.gram_q.shape == (n_layers, n_heads, d_head, d_head)
        and m.gram_k.shape == (*m.sum_k.shape, d_head)
        and m.sum_k.shape[0] == n_layers
        and m.logits.shape == (n_layers, n_heads, n_offsets)
        and m.logit_rows.shape == m.logits.shape
        and m.inv_freq.shape == (n_layers, m.abs_q.shape[-1])
        and len(m.pairing) == n_layers
    )
