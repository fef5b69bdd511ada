"""Keep some heads' activations of one run, and put them into another run of as many tokens.

z is replaced at its hook. Queries and keys are replaced before RoPE and after any norm, by the
machinery of edits: a head's keys are its own, also under grouped-query attention. A head's values
are replaced in its weighted sum alone: z = Σ_j p_ij v'_j with the pattern p of the patched run. A
diagonal of offset Δ is the part p_{i,i−Δ} v_{i−Δ} of z_i: the patched run's part is subtracted and
the other run's is added, and the rest of the row is not renormalised.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ... import bridge
from ...bridge import ModelInfo
from ...bridge.attached import reads_diagonals
from ...edits import Edit, HookContext
from ...errors import ModelError
from ...maths.diagonals import shifted
from ...maths.precision import attention_slack
from ...maths.slash_scores import slash_rows
from ...patching.patch import patch
from .targets import Target, Together, in_layer

#: Activations by target, [batch, pos, d_head].
Kept = dict[Target, Tensor]
#: Size of logits for which the rounding of two computations of z is allowed for (ours).
_LOGIT = 30.0


@dataclass(frozen=True, repr=False)
class _SwapQueries(Edit):
    """Keep the heads' queries in `kept`, or replace them by those that it holds."""

    kept: Kept = field(default_factory=dict, compare=False)
    write: bool = False

    def on_query(
        self, ctx: HookContext, q: Float[Tensor, "batch pos head d_head"]
    ) -> Float[Tensor, "batch pos head d_head"]:
        return _swap(self, "q", ctx, q)

    def __str__(self) -> str:
        return f"activation patching of q of {', '.join(map(str, self.heads))}"


@dataclass(frozen=True, repr=False)
class _SwapKeys(Edit):
    """Keep the heads' keys in `kept`, or replace them by those that it holds."""

    kept: Kept = field(default_factory=dict, compare=False)
    write: bool = False

    def on_key(
        self, ctx: HookContext, k: Float[Tensor, "batch pos head d_head"]
    ) -> Float[Tensor, "batch pos head d_head"]:
        return _swap(self, "k", ctx, k)

    def __str__(self) -> str:
        return f"activation patching of k of {', '.join(map(str, self.heads))}"


def _swap(edit: Any, part: str, ctx: HookContext, x: Tensor) -> Tensor:
    """Keep queries or keys of the edit's heads, or return those kept from another run."""
    wanted = [Target(head, part) for head in edit.heads if head.layer == ctx.layer]
    if edit.write:
        return torch.stack([edit.kept[target] for target in wanted], dim=2).to(x)
    for place, target in enumerate(wanted):
        edit.kept[target] = x[:, :, place].detach().clone()
    return x


@contextmanager
def keeping(model: Any, wanted: Sequence[Target], kept: Kept) -> Iterator[list[tuple[str, Any]]]:
    """Inside, a forward pass with the hooks that are yielded keeps activations in `kept`.

    Raises ModelError where z is not the pattern times the values, for values and diagonals.
    """
    with _attached(model, wanted, kept, write=False) as info:
        yield [
            hook
            for layer in _layers(wanted)
            for hook in _LayerSwap(info, layer, wanted, kept, write=False).hooks()
        ]


@contextmanager
def putting(model: Any, group: Together, kept: Kept) -> Iterator[list[tuple[str, Any]]]:
    """Inside, a forward pass with the hooks that are yielded gets the kept activations."""
    with _attached(model, group.targets, kept, write=True) as info:
        yield [
            hook
            for layer in _layers(group.targets)
            for hook in _LayerSwap(info, layer, group.targets, kept, write=True).hooks()
        ]


@contextmanager
def _attached(model: Any, wanted: Sequence[Target], kept: Kept, write: bool) -> Iterator[ModelInfo]:
    """Inside, edits swap the queries and keys among the targets."""
    edits = [
        made([target.head for target in wanted if target.part == part], kept, write)
        for part, made in (("q", _SwapQueries), ("k", _SwapKeys))
        if any(target.part == part for target in wanted)
    ]
    with ExitStack() as stack:
        if edits:
            stack.enter_context(patch(model, *edits))
        yield bridge.read(model)


def _layers(wanted: Sequence[Target]) -> list[int]:
    """Return the layers with targets, ascending."""
    return sorted({target.head.layer for target in wanted})


class _LayerSwap:
    """Hooks that keep or replace z, values and diagonals of one layer's heads.

    Attributes:
        values: The layer's values in the current pass, [batch, pos, kv_head, d_head].
        changes: What z of a head becomes (for "v"), or what is added to it (for diagonals).
    """

    def __init__(
        self, info: ModelInfo, layer: int, wanted: Sequence[Target], kept: Kept, write: bool
    ) -> None:
        self.info, self.layer, self.kept, self.write = info, layer, kept, write
        self.of = {part: in_layer(wanted, layer, part) for part in ("z", "v", "diagonal")}
        self.values: Tensor | None = None
        self.replaced: dict[int, Tensor] = {}
        self.added: dict[int, Tensor] = {}
        self.expected: dict[int, Tensor] = {}

    def hooks(self) -> Iterator[tuple[str, Any]]:
        """Yield (hook name, function)."""
        if self.of["v"] or self.of["diagonal"]:
            yield self.info.hook(self.layer, "v"), self._on_values
            yield self.info.hook(self.layer, "pattern"), self._on_pattern()
        if any(self.of.values()):
            yield self.info.hook(self.layer, "z"), self._on_z

    def _on_values(self, values: Tensor, hook: Any) -> None:
        info = self.info
        if values.ndim != 4 or values.shape[2:] != (info.n_kv_heads, info.d_head):
            raise ModelError(
                f"{hook.name} has shape {list(values.shape)}; patching values and diagonals needs "
                f"values [batch, pos, {info.n_kv_heads}, {info.d_head}]. Patch z, q or k"
            )
        self.values = values.detach()

    def _of_head(self, head: int) -> Float[Tensor, "batch pos d_head"]:
        """Return the values that a query head reads in this pass."""
        if self.values is None:
            raise ModelError(
                f"the hook {self.info.hook(self.layer, 'v')} did not fire; patching values and "
                "diagonals needs it. Patch z, q or k"
            )
        return self.values[:, :, head * self.info.n_kv_heads // self.info.n_heads]

    def _on_pattern(self) -> Any:
        @reads_diagonals
        def read(pattern: Any, hook: Any) -> None:
            heads = sorted({t.head.head for part in ("v", "diagonal") for t in self.of[part]})
            if not self.write:
                for head in heads:
                    self.expected[head] = _read(pattern, head, self._of_head(head))
            for target in self.of["v"]:
                head = target.head.head
                if self.write:
                    self.replaced[head] = _read(pattern, head, self.kept[target])
                else:
                    self.kept[target] = self._of_head(head).clone()
            if self.of["diagonal"]:
                self._diagonals(pattern)

        return read

    def _diagonals(self, pattern: Any) -> None:
        """Keep what each diagonal writes to z; or note what it would have to write more."""
        offsets = sorted({target.offset for target in self.of["diagonal"]})
        weights = slash_rows(pattern, torch.tensor(offsets, device=pattern.device))
        for target in self.of["diagonal"]:
            head = target.head.head
            v = self._of_head(head)
            weight = weights[:, head, :, offsets.index(target.offset), None]
            wide = torch.promote_types(weight.dtype, torch.float32)
            moved = shifted(v[:, None], target.offset, v.shape[1])[:, 0].to(wide)
            now = weight.to(wide) * moved
            if self.write:
                self.added[head] = self.added.get(head, 0) + (self.kept[target] - now)
            else:
                self.kept[target] = now

    def _on_z(self, z: Tensor, hook: Any) -> Tensor | None:
        if not self.write:
            self._require_sum(z)
            for target in self.of["z"]:
                self.kept[target] = z[:, :, target.head.head].detach().clone()
            return None
        whole = z.clone()
        for target in self.of["z"]:
            whole[:, :, target.head.head] = self.kept[target].to(z)
        for head, new in self.replaced.items():
            whole[:, :, head] = new.to(z)
        for head, more in self.added.items():
            whole[:, :, head] = (z[:, :, head].to(more) + more).to(z)
        self.replaced, self.added, self.values = {}, {}, None
        return whole

    def _require_sum(self, z: Tensor) -> None:
        """Raise ModelError unless z is the pattern times the values, within rounding."""
        for head, expected in self.expected.items():
            found = z[:, :, head].to(expected)
            largest = float(self._of_head(head).abs().max())
            slack = attention_slack(z.dtype, _LOGIT) * largest
            difference = float((found - expected).abs().max())
            if not difference <= slack:
                raise ModelError(
                    f"z of L{self.layer}H{head} differs by {difference:.2g} from its pattern times "
                    "its values (an active edit of z, or attention that does more), so values and "
                    "diagonals cannot be patched there; patch z, q or k"
                )
        self.expected = {}


def _read(
    pattern: Any, head: int, values: Float[Tensor, "batch pos d_head"]
) -> Float[Tensor, "batch pos d_head"]:
    """Return Σ_j p_ij v_j of one head, also where the pattern is not formed."""
    if isinstance(pattern, Tensor):
        rows = pattern[:, head]
        return rows @ values.to(rows)
    parts = []
    for left, block in pattern.pattern_blocks([head]):
        rows = block[:, 0]
        n_rows, n_columns = rows.shape[-2:]
        seen = values[:, left : left + n_columns].to(rows)
        parts.append(rows.tril(n_columns - n_rows) @ seen)
    return torch.cat(parts, dim=1)
