"""Keys of its own for one query head, where its KV group shares them with other heads.

An edit that changes keys must not change those of the head's neighbours. The shared keys stay as
they are; the edited head's keys are kept here, rotated with the very cos and sin that the model
used, laid beside the KV cache token by token, and the head's scores are computed from them before
any hook on the scores runs.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from .calls import Call, CallWatch
from .errors import PatchError
from .precision import MASKED
from .qk import LayerQK
from .symbolic import Scores

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


class PrivateKeys:
    """Private keys of one model; shared by all patches on it, so that edits of one head compose.

    During a pass, by layer: `keys` holds pre-RoPE keys of every query head and `heads` says which
    are a head's own, `q` the queries (rotated where a hook carries those), `tables` cos and sin,
    `frequencies` θ of every head as edits left them. Between passes: rotated keys by KV cache.
    """

    def __init__(self, model: TransformerBridge) -> None:
        self.keys: dict[int, Float[Tensor, "batch pos head d_head"]] = {}
        self.heads: dict[int, list[int]] = {}
        self.q: dict[int, Float[Tensor, "batch pos head d_head"]] = {}
        self.tables: dict[tuple[int, str], Tensor] = {}
        self.frequencies: dict[tuple[str, int], Float[Tensor, "head pair"]] = {}
        self._rotated: dict[int, tuple[list[int], Tensor]] = {}
        self._rewritten: set[int] = set()
        self._cached: weakref.WeakKeyDictionary[Any, dict[int, tuple[list[int], Tensor]]] = (
            weakref.WeakKeyDictionary()
        )
        #: The last layer's newest shared key, which depends on the whole prompt: tells whether the
        #: cache's prompts were reordered since.
        self._witness: weakref.WeakKeyDictionary[Any, Tensor] = weakref.WeakKeyDictionary()
        this = weakref.ref(self)

        def start(call: Call) -> None:
            private = this()
            if private is not None:
                private._clear()

        def end(call: Call, output: Any) -> None:
            private = this()
            if private is not None:
                private._keep(getattr(output, "past_key_values", None))

        self.users = 0
        self._watch = CallWatch(model.original_model, start, end)

    def close(self) -> None:
        """Stop following the model."""
        self._watch.close()

    def _clear(self) -> None:
        stores: tuple[dict[Any, Any], ...] = (
            self.keys, self.heads, self.q, self.tables, self.frequencies, self._rotated
        )  # fmt: skip
        for store in stores:
            store.clear()
        self._rewritten.clear()

    def _keep(self, cache: Any) -> None:
        if cache is not None and self._rotated:
            self._cached[cache] = dict(self._rotated)
            self._witness[cache] = cache.layers[-1].keys[:, :, -1].clone()
        self._clear()

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

    def note_queries(self, qk: LayerQK, q: Float[Tensor, "batch pos head d_head"]) -> None:
        """Keep a layer's queries as its query hook carries them; the last count.

        Not where another hook carries the rotated ones.
        """
        if qk.rotated_q is None or qk.rotated_q.name == qk.q.name:
            self.q[qk.layer] = q

    def rewrite(self, qk: LayerQK, scores: Any, call: Call) -> Any:
        """Scores with those of heads that have private keys computed from them, once a pass.

        The mask is read off the scores: what was at the dtype's lowest number stays there.
        """
        heads = self.heads.get(qk.layer, [])
        if not heads or qk.layer in self._rewritten:
            return scores
        self._rewritten.add(qk.layer)
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
        return qk.rotary.turn_by(x, cos, sin)

    def _rotated_keys(
        self, qk: LayerQK, k: Float[Tensor, "batch pos head d_head"]
    ) -> Float[Tensor, "batch pos head d_head"]:
        """Keys as they enter the dot product: rotated, and weighed by a norm after RoPE."""
        rotated = self._rotate(qk, k)
        return rotated if qk.k.weight is None else rotated * qk.k.weight.to(rotated)

    def _all_keys(
        self, qk: LayerQK, heads: list[int], call: Call
    ) -> Float[Tensor, "batch key own d_head"]:
        """Rotated keys of the cached tokens and then of the new ones."""
        new = self._rotated_keys(qk, self.keys[qk.layer][:, :, heads])
        if call.past:
            known, cached = self._cached.get(call.cache, {}).get(qk.layer, ([], new[:, :0]))
            if known != heads or cached.shape[:2] != (call.batch, call.past):
                lacking = next((head for head in heads if head not in known), heads[0])
                n_known = cached.shape[1] if lacking in known else 0
                raise PatchError(
                    f"L{qk.layer}H{lacking} has keys of its own for {n_known} of {call.past} "
                    "cached tokens; the cache was cropped, reordered or started elsewhere. Start "
                    "inside the patch"
                )
            self._refuse_reordered(qk, call)
            new = torch.cat([cached, new], dim=1)
        self._rotated[qk.layer] = heads, new
        return new

    def _refuse_reordered(self, qk: LayerQK, call: Call) -> None:
        keys = call.cache.layers[-1].keys
        # The last layer itself has taken in the new tokens by the time that its scores exist.
        newest = -call.n_queries - 1 if qk.layer == len(call.cache.layers) - 1 else -1
        if keys.shape[2] >= -newest and not torch.equal(
            keys[:, :, newest], self._witness[call.cache]
        ):
            raise PatchError(
                f"the KV cache was reordered under {call.batch} prompts since the last pass (beam "
                f"search?); keys of their own of heads in layer {qk.layer} cannot follow it"
            )


_shared: weakref.WeakKeyDictionary[Any, PrivateKeys] = weakref.WeakKeyDictionary()


def acquire(model: TransformerBridge, user: object) -> tuple[PrivateKeys, Callable[[], Any]]:
    """The model's private keys, and the function that ends their use by `user`.

    Called by itself when the user is freed; with the last user the keys go.
    """
    private = _shared.get(model)
    if private is None:
        private = _shared[model] = PrivateKeys(model)
    private.users += 1
    return private, weakref.finalize(user, _release, weakref.ref(model), private)


def private_of(model: TransformerBridge | None) -> PrivateKeys | None:
    """The model's private keys, if any patch uses them now."""
    return None if model is None else _shared.get(model)


def _release(model: weakref.ref[Any], private: PrivateKeys) -> None:
    private.users -= 1
    if private.users == 0:  # its hooks go with it, at the next pass
        found = model()
        if found is not None:
            _shared.pop(found, None)
