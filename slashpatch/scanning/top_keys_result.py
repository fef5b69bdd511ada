"""TopKeys: where the attention of some heads goes in one text, as a file and a table."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..data.files import load_tensors, save_tensors
from ..data.heads import Head
from ..errors import ScanError
from ..maths.offsets import as_offsets

if TYPE_CHECKING:
    import pandas as pd

_FORMAT = "slashpatch-top-keys-1"
_TENSORS = ("token_ids", "keys", "weights", "diagonals")


@dataclass(frozen=True, eq=False)
class TopKeys:
    """The largest keys of each token, and some diagonals, of some heads in one text.

    Attributes:
        heads: The heads.
        tokens: Each token's text, decoded by itself: bytes that are no whole character show as the
            replacement character U+FFFD, and an id without text as the number in brackets.
            `token_ids` tell them apart.
        token_ids: The tokens' ids.
        keys: Positions of the keys that each token attends to most, the largest weight first (of
            equal weights the earlier key); −1 where a token has no more keys with a weight above 0.
        weights: Attention to these keys; 0 where there is none.
        offsets: Offsets Δ of the diagonals, ascending.
        diagonals: Attention i → i−Δ; 0 where that token does not exist.
        provenance: Model, dtype, edits, text, versions.
    """

    heads: tuple[Head, ...]
    tokens: tuple[str, ...]
    token_ids: Int[Tensor, "pos"]
    keys: Int[Tensor, "head pos top"]
    weights: Float[Tensor, "head pos top"]
    offsets: tuple[int, ...]
    diagonals: Float[Tensor, "head pos offset"]
    provenance: dict[str, Any]

    def to_dataframe(self) -> pd.DataFrame:
        """Return a row per head, token and key, the largest weight of each token first.

        Columns: name, layer, head, query (the token's position), query_token, rank (from 1), key,
        key_token, offset and weight.
        """
        import pandas as pd

        place, query, rank = (self.keys >= 0).nonzero().unbind(-1)
        key = self.keys[place, query, rank]
        chosen = [self.heads[index] for index in place.tolist()]
        return pd.DataFrame(
            {
                "name": [str(head) for head in chosen],
                "layer": [head.layer for head in chosen],
                "head": [head.head for head in chosen],
                "query": query.numpy(),
                "query_token": [self.tokens[index] for index in query.tolist()],
                "rank": rank.numpy() + 1,
                "key": key.numpy(),
                "key_token": [self.tokens[index] for index in key.tolist()],
                "offset": (query - key).numpy(),
                "weight": self.weights[place, query, rank].numpy(),
            }
        )

    def __repr__(self) -> str:
        return (
            f"<TopKeys of {self.provenance['model']}: {len(self.heads)} heads, "
            f"{len(self.tokens)} tokens, {self.keys.shape[-1]} keys a token>"
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a .safetensors file, whole or not at all.

        Raises ScanError for another suffix, OutputError if the file cannot be written.
        """
        if Path(path).suffix != ".safetensors":
            raise ScanError(f"top keys are saved as a .safetensors file; got {str(path)!r}")
        header = {
            "format": _FORMAT,
            "heads": [str(head) for head in self.heads],
            "tokens": list(self.tokens),
            "offsets": list(self.offsets),
            "provenance": self.provenance,
        }
        save_tensors(path, header, {name: getattr(self, name) for name in _TENSORS})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> TopKeys:
        """Load what `save` wrote. Raises ScanError for any other file."""

        def build(header: dict[str, Any], tensors: dict[str, Tensor]) -> TopKeys:
            offsets = as_offsets(header["offsets"])
            if list(offsets) != header["offsets"]:
                raise ScanError(f"the offsets of {str(path)!r} are not ascending")
            found = cls(
                heads=tuple(Head.parse(name) for name in header["heads"]),
                tokens=tuple(header["tokens"]),
                offsets=offsets,
                provenance=dict(header["provenance"]),
                **{name: tensors[name] for name in _TENSORS},
            )
            if not found._is_consistent():
                raise ScanError(
                    f"{str(path)!r} is damaged: its shapes, dtypes, keys or weights do not agree "
                    "with each other; make it again with top_keys"
                )
            return found

        loaded: TopKeys = load_tensors(path, _FORMAT, build, ScanError)
        return loaded

    def _is_consistent(self) -> bool:
        """Return whether shapes, dtypes and ranges are those of a result of `top_keys`."""
        n_heads, n_pos = len(self.heads), len(self.tokens)
        keys, weights, diagonals = self.keys, self.weights, self.diagonals
        dtypes = {self.token_ids.dtype, keys.dtype}, {weights.dtype, diagonals.dtype}
        return (
            0 < n_heads == len(set(self.heads))
            and n_pos > 0
            and all(isinstance(token, str) for token in self.tokens)
            and dtypes == ({torch.int64}, {torch.float32})
            and self.token_ids.shape == (n_pos,)
            and keys.ndim == 3
            and keys.shape[-1] > 0
            and keys.shape == weights.shape == (n_heads, n_pos, keys.shape[-1])
            and diagonals.shape == (n_heads, n_pos, len(self.offsets))
            and bool((self.token_ids >= 0).all())
            and bool((keys >= -1).all())
            and bool((keys <= torch.arange(n_pos)[:, None]).all())
            and bool(weights.isfinite().all() & diagonals.isfinite().all())
            and bool(((weights > 0) == (keys >= 0)).all() & (weights >= 0).all())
            and bool((weights.diff(dim=-1) <= 0).all())
            and {"model", "fingerprint", "dtype", "edits", "prompts"} <= set(self.provenance)
        )
