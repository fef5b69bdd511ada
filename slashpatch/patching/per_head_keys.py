"""Per-head keys: keys of one query head alone, where its KV group shares them with other heads.

An edit that changes keys must not change those of the head's neighbours. The shared keys stay as
they are; the edited head's keys are kept here, rotated with the very cos and sin that the model
used and laid beside the KV cache token by token, and the head's scores are computed from them
before any hook on the scores runs.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..bridge.forward_call import ForwardCall
from ..bridge.qk import LayerQK
from ..errors import PatchError
from ..maths.precision import MASKED
from .stand_ins import Scores


@dataclass
class CachedKeys:
    """Rotated per-head keys of the tokens in one KV cache, by layer: which heads, and their keys.

    `newest` is the last layer's newest shared key, which depends on the whole prompt: it tells
    whether the cache's prompts were reordered since.
    """

    rotated: dict[int, tuple[list[int], Float[Tensor, "batch key own d_head"]]]
    newest: Float[Tensor, "batch kv_head d_head"]


_cached: weakref.WeakKeyDictionary[Any, CachedKeys] = weakref.WeakKeyDictionary()


@dataclass
class PerHeadKeys:
    """Per-head keys in one forward pass; shared by all patches, so that edits of one head compose.

    Attributes:
        keys: By layer, pre-RoPE keys of every query head.
        heads: By layer, which heads have per-head keys.
        q: By layer, queries; rotated where a hook carries those.
        tables: cos and sin by (layer, "cos" or "sin").
        rotated: By layer, rotated keys of cached and new tokens.
        rewritten: Layers whose scores were computed from them.
    """

    keys: dict[int, Float[Tensor, "batch pos head d_head"]] = field(default_factory=dict)
    heads: dict[int, list[int]] = field(default_factory=dict)
    q: dict[int, Float[Tensor, "batch pos head d_head"]] = field(default_factory=dict)
    tables: dict[tuple[int, str], Tensor] = field(default_factory=dict)
    rotated: dict[int, tuple[list[int], Tensor]] = field(default_factory=dict)
    rewritten: set[int] = field(default_factory=set)

    @classmethod
    def of(cls, call: ForwardCall) -> PerHeadKeys:
        """Return those of a forward pass, which start empty."""
        found: PerHeadKeys = call.state.setdefault(cls, cls())
        return found

    def edit_keys(
        self,
        layer: int,
        heads: list[int],
        shared: Float[Tensor, "batch pos kv_head d_head"],
        n_heads: int,
        act: Callable[[Tensor], Tensor],
    ) -> None:
        """Let `act` edit the heads' own copies of the shared keys, after earlier edits of them."""
        if layer not in self.keys:
            self.keys[layer] = shared.repeat_interleave(n_heads // shared.shape[2], dim=2)
            self.heads[layer] = []
        whole = self.keys[layer].clone()
        whole[:, :, heads] = act(whole[:, :, heads]).to(whole.dtype)
        self.keys[layer] = whole
        self.heads[layer] = sorted({*self.heads[layer], *heads})

    def note_edited_queries(self, qk: LayerQK, q: Float[Tensor, "batch pos head d_head"]) -> None:
        """Replace queries that were caught before an edit changed them.

        Nothing is to be done where none were, or where another hook carries the rotated ones.
        """
        if qk.layer in self.q and (qk.rotated_q is None or qk.rotated_q.name == qk.q.name):
            self.q[qk.layer] = q

    def rewrite_scores(self, qk: LayerQK, scores: Any, call: ForwardCall) -> Any:
        """Return scores whose heads with per-head keys are computed from them; once a pass.

        The attention mask is read off the scores: what was at the dtype's lowest number stays.
        """
        heads = self.heads.get(qk.layer, [])
        if not heads or qk.layer in self.rewritten:
            return scores
        self.rewritten.add(qk.layer)
        rows = self._all_keys(qk, heads, call)
        n_keys = scores.shape[-1]
        if isinstance(scores, Scores):
            scores.attention.set_keys(heads, rows[:, -n_keys:])
            return scores
        q = self.q[qk.layer][:, :, heads]
        if qk.rotated_q is None:
            q = self._rotate(qk, q)
        dtype = torch.promote_types(q.dtype, rows.dtype)
        own = qk.logits(q.to(dtype), rows[:, -n_keys:].to(dtype)).to(scores.dtype)
        shared = scores[:, heads]
        whole = scores.clone()
        masked = shared <= MASKED
        whole[:, heads] = torch.where(masked, shared, own)
        return whole

    def keep(self, cache: Any) -> None:
        """Lay the rotated keys beside a KV cache, for the passes that go on with it."""
        if cache is not None and self.rotated:
            _cached[cache] = CachedKeys(self.rotated, cache.layers[-1].keys[:, :, -1].clone())

    def _rotate(
        self, qk: LayerQK, x: Float[Tensor, "batch pos head d_head"]
    ) -> Float[Tensor, "batch pos head d_head"]:
        """RoPE of the new tokens, with the cos and sin of this very pass."""
        if qk.rotary is None:
            return x
        # In the dtype that the model gets: tables wider than the keys make wider keys.
        cos, sin = (
            qk.pairs_of(self.tables[qk.layer, point])[:, :, None].to(x.device)
            for point in ("cos", "sin")
        )
        return qk.rotary.multiply(x, cos, sin)

    def _rotated_keys(
        self, qk: LayerQK, k: Float[Tensor, "batch pos head d_head"]
    ) -> Float[Tensor, "batch pos head d_head"]:
        """Keys as they enter the dot product: rotated, and weighed by a norm after RoPE."""
        rotated = self._rotate(qk, k)
        return rotated if qk.k.weight is None else rotated * qk.k.weight.to(rotated)

    def _all_keys(
        self, qk: LayerQK, heads: list[int], call: ForwardCall
    ) -> Float[Tensor, "batch key own d_head"]:
        """Rotated keys of the cached tokens and then of the new ones."""
        new = self._rotated_keys(qk, self.keys[qk.layer][:, :, heads])
        if call.past:
            new = torch.cat([self._cached_keys(qk, heads, call, new), new], dim=1)
        self.rotated[qk.layer] = heads, new
        return new

    def _cached_keys(
        self, qk: LayerQK, heads: list[int], call: ForwardCall, new: Tensor
    ) -> Float[Tensor, "batch key own d_head"]:
        kept = _cached.get(call.cache)
        known, cached = (
            ([], new[:, :0]) if kept is None else kept.rotated.get(qk.layer, ([], new[:, :0]))
        )
        if kept is None or known != heads or cached.shape[:2] != (call.batch, call.past):
            if known and cached.shape[:2] == (call.batch, call.past):
                problem = f"the cache was filled under per-head keys of heads {known} there"
            else:
                n_known = cached.shape[1] if set(heads) <= set(known) else 0
                problem = (
                    f"there are some for {n_known} of {call.past} cached tokens: the cache was "
                    "cropped, copied, reordered or filled elsewhere"
                )
            raise PatchError(
                f"heads {heads} of layer {qk.layer} need per-head keys, and {problem}. Start "
                "inside the patch, and run all of the generation under the same edits"
            )
        keys = call.cache.layers[-1].keys
        # The last layer itself has taken in the new tokens by the time that its scores exist.
        newest = -call.n_queries - 1 if qk.layer == len(call.cache.layers) - 1 else -1
        if keys.shape[2] >= -newest and not torch.equal(keys[:, :, newest], kept.newest):
            raise PatchError(
                f"the KV cache was reordered under {call.batch} prompts since the last pass (beam "
                f"search?); per-head keys of layer {qk.layer} cannot follow it"
            )
        return cached
