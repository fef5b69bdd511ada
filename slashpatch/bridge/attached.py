"""What hooks are on a model at this moment: those of edits, and those of others."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


class Mark(NamedTuple):
    """What a hook function of an edit carries as its attribute `slashpatch`.

    Attributes:
        serial: Number of the attachment; later ones have higher numbers.
        place: Index of the edit in the attachment.
        edit: The edit.
    """

    serial: int
    place: int
    edit: Any


def mark_of(hook_fn: Any) -> Mark | None:
    """Return the mark of an edit's hook function, or None for a hook of somebody else."""
    found: Mark | None = getattr(hook_fn, "slashpatch", None)
    return found


def reads_diagonals(hook_fn: Any) -> Any:
    """Mark a hook function that takes scores or pattern through `slash_rows` alone, so that the
    fused engine may call it too.
    """
    hook_fn.reads_diagonals = True
    return hook_fn


def active_edits(model: TransformerBridge) -> tuple[Any, ...]:
    """Return the edits whose hooks are on the model now, in the order of attaching."""
    return tuple(edit for together in active_patches(model) for edit in together)


def active_patches(model: TransformerBridge) -> tuple[tuple[Any, ...], ...]:
    """Return the active edits, those that were attached together in one tuple."""
    marks = [
        mark_of(handle.user_hook) for point in model.hook_points() for handle in point.fwd_hooks
    ]
    found: dict[int, dict[int, Any]] = {}
    for mark in marks:
        if mark is not None:
            found.setdefault(mark.serial, {})[mark.place] = mark.edit
    return tuple(
        tuple(edits[place] for place in sorted(edits)) for _, edits in sorted(found.items())
    )


def has_per_head_keys(model: TransformerBridge) -> bool:
    """Whether an active edit gives heads per-head keys."""
    return any(edit.uses_per_head_keys for edit in active_edits(model))


def other_hooks(model: TransformerBridge) -> list[str]:
    """Return the names of hook points that carry hooks of somebody else."""
    return sorted(
        {
            str(point.name)
            for point in model.hook_points()
            for handle in point.fwd_hooks
            if mark_of(handle.user_hook) is None
        }
    )
