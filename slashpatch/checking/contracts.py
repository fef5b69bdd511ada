"""The checks of one model, in order."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import bridge
from ..bridge.native import NativeRuns, folded_apart
from ..bridge.passes import probe_tokens, run_probe
from ..bridge.qk import LayerQK
from ..data.progress import progress_over
from ..edits import Edit
from ..errors import FusedError, PatchError, SlashpatchError
from ..maths.precision import MASKED, rounding
from ..maths.slash_scores import slash_scores
from ..patching.fused import engine_of_layers, fused, require_fusible
from ..patching.patch import patch
from ..scanning.scan import scan
from . import trials
from .result import Check

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


#: Tokens of the longer prompt, where the context holds so many; of it the shorter one is two
#: thirds, and what is cached first a half.
_LONGEST = 12


#: Where values are jittered to see what rounding does.
_ROUNDED = ("hook_resid_pre", "attn.hook_q", "attn.hook_k", "attn.hook_v",
            "attn.hook_attn_scores", "attn.hook_z")  # fmt: skip


_DRAWS = 4


#: How much further than random roundings the worst ones may go.
_WORST = 4


class _RefusedError(Exception):
    """A check that cannot be made, and why."""


class _Checks:
    """The checks of one model, in order; later ones need the earlier ones."""

    def __init__(self, model: TransformerBridge, seed: int, progress: bool | None) -> None:
        from transformer_lens.utilities.statistics import derive_generator

        self.generator = derive_generator(seed, "check")
        self.model, self.seed, self.progress = model, seed, progress
        self.rows: list[Check] = []
        self.turned: list[LayerQK] = []  # layers with RoPE that could be read

    def run(self) -> list[Check]:
        """Every row of the report."""
        if not self._try("hooks", "", self._hooks):
            return self.rows
        self.long = min(_LONGEST, self.model.cfg.n_ctx)
        self.short = 2 * self.long // 3
        self.tokens = torch.randint(
            0, self.model.cfg.d_vocab, (2, self.long), generator=self.generator
        ).to(torch.device(self.model.cfg.device))
        self.eps = rounding(next(self.model.original_model.parameters()).dtype)
        self.logits = self._logits(self.tokens)
        self.limit = self._rounding_limit(None, self.logits)
        self._try("attention", "", self._attention)
        self._try("rows", "", self._rows)
        self._try("scores", "", self._scores)
        self._try("q, k and RoPE", "", self._rope)
        self._try("dtype", "", self._dtype)
        self._try("cache", "no edit", lambda: self._cache(None, self.logits))
        can_pad = self._try("padding", "no edit", lambda: self._padding(None, self.logits))
        can_fuse = self._try("fused", "no edit", lambda: self._fused(None, self.logits))
        edits = trials.edits(self.model, self.turned, self.tokens)
        for make in progress_over(edits, "checking edits", show=self.progress):
            self._check_edit(*make, can_pad, can_fuse)
        self._identities()
        return self.rows

    def _try(self, contract: str, subject: str, test: Callable[[], str]) -> bool:
        """Run one test and note what came of it; what it returns says how close it was."""
        try:
            with torch.no_grad():
                row = Check(contract, subject, "pass", test())
        except _RefusedError as refusal:
            row = Check(contract, subject, "refused", str(refusal))
        except AssertionError as failure:
            row = Check(contract, subject, "fail", str(failure))
        except PatchError as error:  # what was attached did not do what it said
            row = Check(contract, subject, "fail", str(error))
        except SlashpatchError as error:
            row = Check(contract, subject, "refused", str(error))
        except Exception as error:  # whatever a model may raise is a finding of the check
            row = Check(contract, subject, "fail", f"{type(error).__name__}: {error}")
        self.rows.append(row)
        return row.status == "pass"

    def _logits(self, tokens: Tensor, **kwargs: Any) -> Tensor:
        with torch.no_grad():
            found: Tensor = self.model.original_model(tokens, **kwargs).logits
        return found

    def _close(
        self, what: str, found: Tensor, expected: Tensor, limit: float, edit: Edit | None = None
    ) -> str:
        off = float((found.double() - expected.double()).abs().max())
        if off > limit and edit is not None:  # an edit may sharpen what rounding does
            limit = max(limit, self._rounding_limit(edit, expected, 4 * _DRAWS))
        said = f"{what} {off:.2g} off, {limit:.2g} allowed"
        assert off <= limit, said
        return said

    def _rounding_limit(self, edit: Edit | None, logits: Tensor, n_draws: int = _DRAWS) -> float:
        """How far rounding may move a logit under an edit, measured.

        A choice of experts that rounding tips over shows in some draws only.
        """

        def jitter(x: Tensor, hook: Any) -> Tensor:
            noise = torch.rand(x.shape, generator=self.generator) * 2 - 1
            moved = x * (1 + self.eps * noise.to(x.device)).to(x.dtype)
            return torch.where(x <= MASKED, x, moved)

        available = self.model.hook_dict
        points = [
            f"blocks.{layer}.{point}"
            for layer in range(self.model.cfg.n_layers)
            for point in _ROUNDED
        ]
        hooks = [(point, jitter) for point in points if point in available]
        tokens = self.tokens[-logits.shape[0] :, : logits.shape[1]]
        largest = 0.0
        for _ in range(n_draws):
            with torch.no_grad(), self._under(edit):
                moved = self.model.run_with_hooks(tokens, fwd_hooks=hooks)
            largest = max(largest, float((moved.double() - logits.double()).abs().max()))
        return _WORST * (largest + self.eps * float(logits.abs().max()))

    def _hooks(self) -> str:
        a = bridge.read(self.model)
        groups = "" if a.n_heads == a.n_kv_heads else f" on {a.n_kv_heads} KV heads"
        return f"{a.n_layers} layers of {a.n_heads} heads{groups}, d_head {a.d_head}"

    def _attention(self) -> str:
        if folded_apart(self.model):
            raise _RefusedError(
                "compatibility mode folded weights into projections that the wrapped attention "
                "does not use; check the model before enabling it"
            )
        with NativeRuns(self.model) as native:
            run_probe(self.model, probe_tokens(self.model.cfg.d_vocab), native.hooks())
        for layer, _, _, why in native.found:
            if why:
                raise _RefusedError(f"layer {layer} cannot be run alone: {why}")
        worst = max(native.found, key=lambda one: one.off / one.allowed)
        assert worst.off <= worst.allowed, f"layer {worst.layer} is {worst.off:.2g} off"
        return f"layer {worst.layer} {worst.off:.2g} off, {worst.allowed:.2g} allowed"

    def _patterns(self) -> dict[int, Tensor]:
        a = bridge.read(self.model)
        found: dict[int, Tensor] = {}

        def keep(pattern: Tensor, hook: Any) -> None:
            found[hook.layer()] = pattern.detach()

        hooks = [(a.hook(layer, "pattern"), keep) for layer in range(a.n_layers)]
        self.model.run_with_hooks(self.tokens, fwd_hooks=hooks)
        return found

    def _rows(self) -> str:
        with_sinks = []
        for layer, pattern in self._patterns().items():
            total = pattern.double().sum(-1)
            # Each weight is rounded by half an eps of itself, and in float32 each term of the sum
            # that it was divided by.
            limit = self.eps + pattern.shape[-1] * rounding(torch.float32)
            assert float(total.max()) <= 1 + limit, f"rows of layer {layer} sum to more than one"
            sinks = getattr(self.model.blocks[layer].attn.original_component, "sinks", None)
            if sinks is None:
                off = float((total - 1).abs().max())
                assert off <= limit, f"rows of layer {layer} sum to one but for {off:.2g}"
            else:
                with_sinks.append(layer)
        if with_sinks:
            return f"rows of layers {with_sinks} sum to one minus the sink's share"
        return "rows sum to one"

    def _scores(self) -> str:
        a = bridge.read(self.model)
        offsets = range(min(5, self.long))
        direct = torch.stack(
            [slash_scores(p, offsets).mean(0).cpu() for _, p in sorted(self._patterns().items())]
        )
        made = scan(
            self.model, self.tokens.cpu(), offsets, "bridge", moments=False, progress=False
        ).scores
        assert made.shape == (a.n_layers, a.n_heads, len(offsets)), f"scores of shape {made.shape}"
        # The same pattern, but for what a batch of another size rounds.
        return self._close("slash scores", made, direct, max(8 * self.eps, 1e-6))

    def _rope(self) -> str:
        layers = bridge.read(self.model).qk
        kinds = [
            f"{qk.rotary.n_pairs} {qk.rotary.pairing} pairs" if qk.rotary else "none"
            for qk in layers
        ]
        self.turned = [qk for qk in layers if qk.rotary]
        if not self.turned:
            raise _RefusedError("no layer has RoPE: no rotary edits, no profiles")
        said = ", ".join(f"{kinds.count(kind)} × {kind}" for kind in dict.fromkeys(kinds))
        follows = any(qk.live for qk in layers)
        live = "; frequencies follow the prompt's length" if follows else ""
        return f"layers: {said}{live}"

    def _dtype(self) -> str:
        dtype = next(self.model.original_model.parameters()).dtype
        assert bool(self.logits.isfinite().all()), "logits are not finite"
        assert math.isfinite(self.limit), "a rounding moves logits beyond what the dtype holds"
        sums = scan(self.model, self.tokens.cpu(), 1, moments=False, progress=False).sums
        assert sums.dtype == torch.float64, f"sums are of {sums.dtype}"
        name = str(dtype).removeprefix("torch.")
        return f"{name}; sums in float64; rounding moves logits by at most {self.limit:.2g}"

    def _check_edit(
        self, name: str, make: Callable[[], tuple[Edit, Edit]], can_pad: bool, can_fuse: bool
    ) -> None:
        made: list[Edit] = []
        logits: list[Tensor] = []

        def edits() -> str:
            made.extend(make())
            for edit in dict.fromkeys(made):
                with patch(self.model, edit):
                    logits.append(self._logits(self.tokens))
            assert not torch.equal(logits[0], self.logits), "the logits did not change"
            assert torch.equal(self._logits(self.tokens), self.logits), "leaving it left a trace"
            moved = float((logits[0].double() - self.logits.double()).abs().max())
            return f"{made[0]} moves a logit by {moved:.2g}, and leaves no trace"

        if self._try("edits", name, edits):
            self._try("cache", name, lambda: self._cache(made[1], logits[-1]))
            if can_pad:
                self._try("padding", name, lambda: self._padding(made[0], logits[0]))
            if can_fuse:
                self._try("fused", name, lambda: self._fused(made[0], logits[0]))

    def _under(self, edit: Edit | None) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext() if edit is None else patch(self.model, edit)

    def _cache(self, edit: Edit | None, whole: Tensor) -> str:
        steps = []
        with self._under(edit):
            cache = None
            ends = sorted({0, self.long // 2, self.short, self.long})
            for start, stop in itertools.pairwise(ends):
                part = self.tokens[:, start:stop]
                out = self.model.original_model(part, past_key_values=cache, use_cache=True)
                cache = getattr(out, "past_key_values", None)
                if cache is None:
                    raise _RefusedError("the model returns no KV cache")
                steps.append(out.logits)
        return self._close("cached tokens", torch.cat(steps, 1), whole, self.limit, edit)

    def _padding(self, edit: Edit | None, whole: Tensor) -> str:
        long, short = self.long, self.short
        with self._under(edit):
            alone = [whole[:1], self._logits(self.tokens[1:, :short])]
        said = ""
        for side in ("right", "left"):
            batch, mask = self.tokens.clone(), torch.ones_like(self.tokens)
            at = slice(0, short) if side == "right" else slice(long - short, long)
            pad = slice(short, long) if side == "right" else slice(0, long - short)
            batch[1, at], batch[1, pad], mask[1, pad] = self.tokens[1, :short], 0, 0
            kwargs: dict[str, Tensor] = {"attention_mask": mask}
            if side == "left":
                kwargs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
            with self._under(edit):
                both = self._logits(batch, **kwargs)
            if edit is None and bool(both[1:, at].isnan().any()):
                raise _RefusedError(f"the model itself gives NaN for a prompt padded {side}")
            self._close(f"the long prompt beside one padded {side}", both[:1], alone[0], self.limit)
            said = self._close(f"a prompt padded {side}", both[1:, at], alone[1], self.limit, edit)
        return said

    def _fused(self, edit: Edit | None, expected: Tensor) -> str:
        require_fusible(self.model)
        with self._under(edit), fused(self.model):
            found = self._logits(self.tokens)
            went = sorted(set(engine_of_layers(self.model)))
        if "bridge" in went:
            raise FusedError("a layer formed its matrix")
        return (
            f"{self._close('logits', found, expected, self.limit, edit)}, by {' and '.join(went)}"
        )

    def _identities(self) -> None:
        for edit in trials.identities(bridge.read(self.model), self.turned):

            def nothing(edit: Edit = edit) -> str:
                with patch(self.model, edit):
                    found = self._logits(self.tokens)
                return self._close("logits", found, self.logits, self.limit)

            self._try("identities", str(edit), nothing)
