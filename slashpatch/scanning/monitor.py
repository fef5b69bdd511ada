"""SlashMonitor: measure slash scores while the model runs or generates."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .. import bridge
from ..bridge.attached import reads_diagonals
from ..bridge.forward_call import ForwardCall
from ..bridge.passes import first_layer
from ..bridge.watch import ForwardWatch, watch
from ..data import display
from ..data.heads import Head
from ..errors import PatchError
from ..maths.slash_scores import real_rows, slash_rows
from .moment_sums import widest_float
from .result import require_kappa

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

#: A head is detected from this many rows on, and this many standard errors above κ. *Ours*.
_MIN_ROWS = 16
_STANDARD_ERRORS = 3.0


class Detection(NamedTuple):
    """A head whose score at an offset reaches κ, with the score over the `n_rows` rows so far."""

    head: Head
    offset: int
    score: float
    n_rows: int


class _PassReader:
    """A monitor's hooks in one forward pass, and which rows count there."""

    def __init__(self, monitor: SlashMonitor, call: ForwardCall) -> None:
        self.call = call
        self.handles: list[tuple[Any, Any]] = []
        self.rows: Bool[Tensor, "batch query offset"] | None = None

        @reads_diagonals
        def hook_fn(pattern: Any, hook: Any) -> None:
            monitor._accumulate(pattern, hook, self)

        self.hook = hook_fn

    def remove_hooks(self) -> None:
        """Take the hooks off the model."""
        for point, handle in self.handles:
            handle.hook.remove()
            point.fwd_hooks[:] = [kept for kept in point.fwd_hooks if kept is not handle]
        self.handles = []


class SlashMonitor:
    """Measure slash scores in every forward pass inside the `with` block.

    Scores are means over rows of the pattern (query positions), pooled over passes and prompts: a
    prefill adds all its rows, a generation step one row per prompt. The monitor reads the pattern
    after all edits, whatever the order of nesting, and does not change the model's outputs. It
    stores sums only.

    A head is detected, once, when at some offset it has at least 16 rows and its score minus three
    standard errors over rows reaches κ (*ours*; a rule of thumb and not a test, because the rows of
    one prompt are not independent). After that pass `on_detect(head, offset, score, n_rows)` is
    called, with the offset of the head's highest score among those that qualify.

    Padding is left out. TransformerLens pads batches of texts on the right without an attention
    mask, so in a batch without a mask, trailing pad tokens count as padding (pass `attention_mask`
    if they are not). In batched generation, the filler after a prompt's EOS is left out.

    Args:
        model: A TransformerBridge in evaluation mode.
        offsets: Δ ≥ 0: an int, ints, a range, or text such as "0-15".
        kappa: Threshold of the scores, from 0 to 1.
        on_detect: Called for each detection; an exception in it ends the run.

    Attributes:
        detections: The detections so far, in order.

    Raises:
        ModelError: A model that slashpatch does not support.
        OffsetError: Offsets beyond the context.
        ScanError: κ outside [0, 1].
        PromptError: In a forward pass, an attention mask with a gap inside a prompt.
    """

    def __init__(
        self,
        model: TransformerBridge,
        offsets: Any = range(16),
        kappa: float = 0.1,
        on_detect: Callable[[Head, int, float, int], Any] | None = None,
    ) -> None:
        require_kappa(kappa)
        self.model = model
        self.info = bridge.read(model)
        self.offsets = self.info.require_offsets(offsets)
        self.kappa = kappa
        self.on_detect = on_detect
        self.detections: list[Detection] = []
        self._detected = torch.zeros(self.info.n_layers, self.info.n_heads, dtype=torch.bool)
        # By layer: sums and sums of squares [head, offset], rows [offset], newest [head, offset]
        self._layers: dict[int, list[Tensor]] = {}
        self._watch: ForwardWatch | None = None
        self._lock = threading.Lock()  # of the sums: passes may run in several threads
        self._readers: list[_PassReader] = []
        self._last = torch.zeros(0, dtype=torch.int64)
        self._finished = torch.zeros(0, dtype=torch.bool)

    def __enter__(self) -> SlashMonitor:
        if self._watch is not None:
            raise PatchError("this monitor is already running; make a second monitor to nest them")
        self._watch = watch(self.model)
        self._watch.follow(self)
        return self

    def __exit__(self, *exception: object) -> None:
        for reader in self._readers:  # of passes whose end was not seen, as after Ctrl-C
            reader.remove_hooks()
        self._readers = []
        if self._watch is not None:
            self._watch.unfollow(self)
        self._watch = None

    def on_pass_start(self, call: ForwardCall) -> None:
        """Attach the hooks that read the pattern in this pass."""
        # Hooks fire in the order in which they were added, and the monitor must run after all
        # edits, also after edits that are patched in later; so it attaches anew in each pass.
        if call.own:
            return
        self._find_finished(call)
        reader = _PassReader(self, call)
        self._readers.append(reader)
        points = self.model.hook_dict
        for name in self.info.hooks("pattern"):
            handle = points[name].add_hook(reader.hook, is_permanent=True)
            reader.handles.append((points[name], handle))

    def on_pass_end(self, call: ForwardCall, output: Any) -> None:
        """Remove the hooks of this pass, and report new detections."""
        for reader in [reader for reader in self._readers if reader.call is call]:
            reader.remove_hooks()
            self._readers.remove(reader)
        if not call.own:
            self._detect()

    def _find_finished(self, call: ForwardCall) -> None:
        """Find the prompts of a batch whose generation has ended: they repeat EOS as filler."""
        eos = getattr(self.model.tokenizer, "eos_token_id", None)
        if call.tokens.ndim != 2 or eos is None:
            return
        if call.past and call.n_queries == 1 and len(self._last) == call.batch:
            filler = (self._last == eos) & (call.tokens[:, 0] == eos)
            self._finished = (self._finished | filler) if call.batch > 1 else self._finished
        else:
            self._finished = torch.zeros(call.batch, dtype=torch.bool, device=call.device)
        self._last = call.tokens[:, -1]

    def _accumulate(self, pattern: Any, hook: Any, reader: _PassReader) -> None:
        """Add the rows of real (unpadded) tokens of one layer's pattern to the sums."""
        if self._watch is None or self._watch.current is not reader.call:
            return  # the monitor has ended, or another pass fired the hook of this one
        call = reader.call
        if hook.layer() < first_layer(self.model):
            return
        call.cached_columns(pattern.shape[-1])  # refuses static KV caches
        offsets = torch.tensor(self.offsets, device=pattern.device)
        if reader.rows is None:
            # Rows i ≥ Δ also count if a sliding-window cache has dropped key i−Δ: attention is 0.
            reader.rows = real_rows(self._real(call), call.n_queries, offsets.to(call.device))
            if len(self._finished) == call.batch:
                reader.rows = reader.rows & ~self._finished[:, None, None]
        rows = reader.rows.to(pattern.device)
        weights = slash_rows(pattern.detach(), offsets)
        weights = weights.to(widest_float(weights)).masked_fill(~rows[:, None], 0)
        newest = weights[:, :, -1].sum(0) / rows[:, -1].sum(0).clamp(min=1)
        parts = [weights.sum((0, 2)), weights.square().sum((0, 2)), rows.sum((0, 1))]
        layer = hook.layer()
        with self._lock:
            if layer in self._layers:
                parts = [old + new for old, new in zip(self._layers[layer], parts, strict=False)]
            self._layers[layer] = [*parts, newest]

    def _real(self, call: ForwardCall) -> Bool[Tensor, "batch key"]:
        """Return which tokens are real, also in right-padded batches without a mask."""
        if call.real is not None:
            return call.real
        real = torch.ones(
            call.batch, call.past + call.n_queries, dtype=torch.bool, device=call.device
        )
        tokenizer = self.model.tokenizer
        padded = getattr(tokenizer, "pad_token_id", None) is not None and call.batch > 1
        if padded and call.attention_mask is None and not call.past and call.tokens.ndim == 2:
            from transformer_lens.utilities import get_attention_mask

            real = get_attention_mask(tokenizer, call.tokens, True, "right").bool()
        return real

    def _stacked(self, part: int) -> Tensor:
        """Return one running sum for all layers, in float64; 0 for layers that never ran."""
        n_offsets = len(self.offsets)
        shape = (n_offsets,) if part == 2 else (self.info.n_heads, n_offsets)
        empty = torch.zeros(shape, dtype=torch.float64)
        return torch.stack(
            [
                self._layers[layer][part].cpu().double() if layer in self._layers else empty
                for layer in range(self.info.n_layers)
            ]
        )

    @property
    def n_rows(self) -> Int[Tensor, "layer offset"]:
        """Number of rows so far."""
        return self._stacked(2).long()

    @property
    def scores(self) -> Float[Tensor, "layer head offset"]:
        """Mean attention i → i−Δ over the rows so far; NaN if there are none."""
        return self._stacked(0) / self.n_rows[:, None]

    @property
    def newest(self) -> Float[Tensor, "layer head offset"]:
        """Attention i → i−Δ of the newest token alone (mean over the batch)."""
        return self._stacked(3)

    def standard_errors(self) -> Float[Tensor, "layer head offset"]:
        """Return each score's standard error, as if rows were independent; NaN below 2 rows."""
        n = self.n_rows[:, None].double()
        variance = (self._stacked(1) - self._stacked(0) ** 2 / n).clamp(min=0) / (n - 1)
        return torch.where(n > 1, (variance / n).sqrt(), torch.nan)

    def slash_heads(self, kappa: float | None = None) -> list[Detection]:
        """Return the heads and offsets whose score now reaches κ, the highest first.

        Unlike `detections`, without a minimum of rows or standard errors.
        """
        kappa = self.kappa if kappa is None else kappa
        require_kappa(kappa)
        return self._entries((self.scores >= kappa).nonzero().tolist())

    def plot(self, backend: str = "matplotlib") -> Any:
        """Return the grid of heads so far, as a matplotlib figure or ("altair") a chart.

        Raises PlotError for another backend, ExtraError if Altair is not installed.
        """
        return display.plot(self, backend)

    def _repr_html_(self) -> str:
        return display.html(self)

    def _entries(self, indices: list[list[int]]) -> list[Detection]:
        """Return detections for indices [layer, head, offset column], the highest score first."""
        scores, rows = self.scores, self.n_rows
        entries = [
            Detection(
                Head(layer, head),
                self.offsets[column],
                float(scores[layer, head, column]),
                int(rows[layer, column]),
            )
            for layer, head, column in indices
        ]
        return sorted(entries, key=lambda entry: (-entry.score, entry.head, entry.offset))

    def _detect(self) -> None:
        """Record and report the heads that qualify for the first time."""
        scores = self.scores
        qualifies = (self.n_rows >= _MIN_ROWS)[:, None] & (
            scores - _STANDARD_ERRORS * self.standard_errors() >= self.kappa
        )
        new = qualifies.any(-1) & ~self._detected
        if not bool(new.any()):
            return
        self._detected |= new
        best = scores.masked_fill(~qualifies, -1).argmax(-1)
        indices = [[layer, head, int(best[layer, head])] for layer, head in new.nonzero().tolist()]
        for detection in self._entries(indices):
            self.detections.append(detection)
            if self.on_detect is not None:
                self.on_detect(*detection)
