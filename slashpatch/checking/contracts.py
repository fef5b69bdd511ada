"""The checks of one model, contract by contract."""

from __future__ import annotations

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
from ..maths.precision import rounding
from ..maths.slash_scores import slash_scores
from ..patching.fused import engine_of_layers, fused, require_fusible
from ..patching.patch import patch
from ..scanning.scan import scan
from . import trials
from .result import Check
from .rounding_limit import N_DRAWS, patched, rounding_limit

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


#: Tokens of the longer prompt, or the model's context if that is shorter. The shorter prompt has
#: two thirds of it.
_LONGEST = 12


class _RefusedError(Exception):
    """Raised, with the reason, for a check that cannot be made on this model."""


class Checker:
    """Runs the checks of one model, in order; later checks use what earlier checks found."""

    def __init__(self, model: TransformerBridge, seed: int, progress: bool | None) -> None:
        from transformer_lens.utilities.statistics import derive_generator

        self.generator = derive_generator(seed, "check")
        self.model, self.seed, self.progress = model, seed, progress
        self.checks: list[Check] = []
        self.rope_layers: list[LayerQK] = []

    def run(self) -> list[Check]:
        """Run and return all checks; only the first if the hooks cannot be read."""
        if not self._try("hooks", "", self._hooks):
            return self.checks
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
        edits = trials.edits(self.model, self.rope_layers, self.tokens)
        for make in progress_over(edits, "checking edits", show=self.progress):
            self._check_edit(*make, can_pad, can_fuse)
        self._identities()
        return self.checks

    def _try(self, contract: str, subject: str, test: Callable[[], str]) -> bool:
        """Run one check and add its row; return whether it passed.

        `test` returns the row's detail, or raises.
        """
        try:
            with torch.no_grad():
                row = Check(contract, subject, "pass", test())
        except _RefusedError as refusal:
            row = Check(contract, subject, "refused", str(refusal))
        except AssertionError as failure:
            row = Check(contract, subject, "fail", str(failure))
        except PatchError as error:  # an attached edit did not act: a failure, not a refusal
            row = Check(contract, subject, "fail", str(error))
        except SlashpatchError as error:
            row = Check(contract, subject, "refused", str(error))
        except Exception as error:  # any error that the model raises is a result of the check
            row = Check(contract, subject, "fail", f"{type(error).__name__}: {error}")
        self.checks.append(row)
        return row.status == "pass"

    def _logits(self, tokens: Tensor, **kwargs: Any) -> Tensor:
        with torch.no_grad():
            logits: Tensor = self.model.original_model(tokens, **kwargs).logits
        return logits

    def _close(
        self, what: str, actual: Tensor, expected: Tensor, limit: float, edit: Edit | None = None
    ) -> str:
        """Return a text with the largest difference; raise AssertionError if it exceeds `limit`."""
        off = float((actual.double() - expected.double()).abs().max())
        if off > limit and edit is not None:  # an edit may amplify rounding: measure under it
            limit = max(limit, self._rounding_limit(edit, expected, 4 * N_DRAWS))
        detail = f"{what} differ by up to {off:.2g}, {limit:.2g} allowed"
        assert off <= limit, detail
        return detail

    def _rounding_limit(self, edit: Edit | None, logits: Tensor, n_draws: int = N_DRAWS) -> float:
        """Return how much rounding may change these logits of the checker's prompts."""
        tokens = self.tokens[-logits.shape[0] :, : logits.shape[1]]
        return rounding_limit(self.model, tokens, logits, edit, self.generator, n_draws)

    def _hooks(self) -> str:
        info = bridge.read(self.model)
        groups = "" if info.n_heads == info.n_kv_heads else f" on {info.n_kv_heads} KV heads"
        return f"{info.n_layers} layers of {info.n_heads} heads{groups}, d_head {info.d_head}"

    def _attention(self) -> str:
        if folded_apart(self.model):
            raise _RefusedError(
                "compatibility mode folded weights into TransformerLens' projections, which the "
                "wrapped Transformers attention does not use; check the model before enabling it"
            )
        with NativeRuns(self.model) as native:
            run_probe(self.model, probe_tokens(self.model.cfg.d_vocab), native.hooks())
        for layer, _, _, why in native.found:
            if why:
                raise _RefusedError(f"the attention of layer {layer} cannot be run alone: {why}")
        worst = max(native.found, key=lambda run: run.off / run.allowed)
        detail = f"layer {worst.layer} differs by {worst.off:.2g}, {worst.allowed:.2g} allowed"
        assert worst.off <= worst.allowed, detail
        return detail

    def _patterns(self) -> dict[int, Tensor]:
        """Return the attention pattern of every layer, by layer."""
        by_layer: dict[int, Tensor] = {}

        def keep(pattern: Tensor, hook: Any) -> None:
            by_layer[hook.layer()] = pattern.detach()

        hooks = [(name, keep) for name in bridge.read(self.model).hooks("pattern")]
        self.model.run_with_hooks(self.tokens, fwd_hooks=hooks)
        return by_layer

    def _rows(self) -> str:
        with_sinks = []
        for layer, pattern in self._patterns().items():
            total = pattern.double().sum(-1)
            # Rounding of each weight adds up to half an eps, and the softmax's sum in float32 up to
            # half an eps of float32 per term; twice that is allowed.
            limit = self.eps + pattern.shape[-1] * rounding(torch.float32)
            assert float(total.max()) <= 1 + limit, f"rows of layer {layer} sum to more than one"
            sinks = getattr(self.model.blocks[layer].attn.original_component, "sinks", None)
            if sinks is None:
                off = float((total - 1).abs().max())
                assert off <= limit, f"rows of layer {layer} sum to one only up to {off:.2g}"
            else:
                with_sinks.append(layer)
        if with_sinks:
            return f"rows of layers {with_sinks} sum to one minus the attention sink's share"
        return "rows sum to one"

    def _scores(self) -> str:
        info = bridge.read(self.model)
        offsets = range(min(5, self.long))
        direct = torch.stack(
            [slash_scores(p, offsets).mean(0).cpu() for _, p in sorted(self._patterns().items())]
        )
        scores = scan(
            self.model, self.tokens.cpu(), offsets, "bridge", moments=False, progress=False
        ).scores
        expected = (info.n_layers, info.n_heads, len(offsets))
        assert scores.shape == expected, f"scores of shape {scores.shape}; expected {expected}"
        # A batch of another size may round the same pattern differently.
        return self._close("slash scores", scores, direct, max(8 * self.eps, 1e-6))

    def _rope(self) -> str:
        layers = bridge.read(self.model).qk
        kinds = [
            f"{qk.rotary.n_pairs} {qk.rotary.pairing} pairs" if qk.rotary else "none"
            for qk in layers
        ]
        self.rope_layers = [qk for qk in layers if qk.rotary]
        if not self.rope_layers:
            raise _RefusedError("no layer has RoPE, so there are no rotary edits and no profiles")
        counts = ", ".join(f"{kinds.count(kind)} × {kind}" for kind in dict.fromkeys(kinds))
        follows = any(qk.live for qk in layers)
        live = "; frequencies follow the prompt's length" if follows else ""
        return f"layers: {counts}{live}"

    def _dtype(self) -> str:
        dtype = next(self.model.original_model.parameters()).dtype
        assert bool(self.logits.isfinite().all()), "logits are not finite"
        assert math.isfinite(self.limit), (
            "rounding changes logits beyond the dtype's largest number"
        )
        sums = scan(self.model, self.tokens.cpu(), 1, moments=False, progress=False).sums
        assert sums.dtype == torch.float64, f"sums are in {sums.dtype}"
        name = str(dtype).removeprefix("torch.")
        return f"{name}; sums in float64; rounding may change logits by up to {self.limit:.2g}"

    def _check_edit(
        self, name: str, make: Callable[[], tuple[Edit, Edit]], can_pad: bool, can_fuse: bool
    ) -> None:
        """Check one edit: that it acts and leaves no trace, and the contracts under it."""
        made: list[Edit] = []
        logits: list[Tensor] = []

        def edits() -> str:
            made.extend(make())
            for edit in dict.fromkeys(made):
                with patch(self.model, edit):
                    logits.append(self._logits(self.tokens))
            assert not torch.equal(logits[0], self.logits), "the logits did not change"
            assert torch.equal(self._logits(self.tokens), self.logits), (
                "the logits did not return to those before the patch"
            )
            change = float((logits[0].double() - self.logits.double()).abs().max())
            return f"{made[0]} changes a logit by {change:.2g}, and leaves no trace"

        if self._try("edits", name, edits):
            self._try("cache", name, lambda: self._cache(made[1], logits[-1]))
            if can_pad:
                self._try("padding", name, lambda: self._padding(made[0], logits[0]))
            if can_fuse:
                self._try("fused", name, lambda: self._fused(made[0], logits[0]))

    def _cache(self, edit: Edit | None, whole: Tensor) -> str:
        """Compare a prompt in steps with a KV cache to one pass, whose logits are `whole`."""
        steps = []
        with patched(self.model, edit):
            cache = None
            ends = sorted({0, self.long // 2, self.short, self.long})
            for start, stop in itertools.pairwise(ends):
                part = self.tokens[:, start:stop]
                out = self.model.original_model(part, past_key_values=cache, use_cache=True)
                cache = getattr(out, "past_key_values", None)
                if cache is None:
                    raise _RefusedError("the model returns no KV cache")
                steps.append(out.logits)
        return self._close("logits with a KV cache", torch.cat(steps, 1), whole, self.limit, edit)

    def _padding(self, edit: Edit | None, whole: Tensor) -> str:
        """Compare a padded prompt and its neighbour in a batch to each prompt alone."""
        long, short = self.long, self.short
        with patched(self.model, edit):
            alone = [whole[:1], self._logits(self.tokens[1:, :short])]
        detail = ""
        for side in ("right", "left"):
            batch, mask = self.tokens.clone(), torch.ones_like(self.tokens)
            at = slice(0, short) if side == "right" else slice(long - short, long)
            pad = slice(short, long) if side == "right" else slice(0, long - short)
            batch[1, at], batch[1, pad], mask[1, pad] = self.tokens[1, :short], 0, 0
            kwargs: dict[str, Tensor] = {"attention_mask": mask}
            if side == "left":
                kwargs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
            with patched(self.model, edit):
                both = self._logits(batch, **kwargs)
            if edit is None and bool(both[1:, at].isnan().any()):
                raise _RefusedError(f"the model itself gives NaN for a prompt padded on the {side}")
            beside = f"logits of a prompt beside one padded on the {side}"
            self._close(beside, both[:1], alone[0], self.limit)
            padded = f"logits of a prompt padded on the {side}"
            detail = self._close(padded, both[1:, at], alone[1], self.limit, edit)
        return detail

    def _fused(self, edit: Edit | None, expected: Tensor) -> str:
        """Compare the fused engine to the logits of TransformerLens' attention."""
        require_fusible(self.model)
        with patched(self.model, edit), fused(self.model):
            logits = self._logits(self.tokens)
            engines = sorted(set(engine_of_layers(self.model)))
        if "bridge" in engines:
            raise FusedError("a layer formed its attention matrix")
        detail = self._close("logits", logits, expected, self.limit, edit)
        return f"{detail}, by {' and '.join(engines)}"

    def _identities(self) -> None:
        for edit in trials.identities(bridge.read(self.model), self.rope_layers):

            def identity(edit: Edit = edit) -> str:
                with patch(self.model, edit):
                    logits = self._logits(self.tokens)
                return self._close("logits", logits, self.logits, self.limit)

            self._try("identities", str(edit), identity)
