"""Errors: each says what was expected, what came, and what to do."""

from __future__ import annotations


class SlashpatchError(Exception):
    """Base of every error that slashpatch raises on purpose."""


class HeadError(SlashpatchError, ValueError):
    """A head that cannot be read, or that the model does not have."""


class OffsetError(SlashpatchError, ValueError):
    """An offset that is no non-negative integer, or that no prompt can hold."""


class BandError(SlashpatchError, ValueError):
    """A band of rotary pairs that is misspelt, empty, or that the head lacks."""


class PromptError(SlashpatchError, ValueError):
    """Prompts that are empty, too long, missing, or of the wrong type."""


class ModelError(SlashpatchError, ValueError):
    """A model that slashpatch does not know how to read, and therefore refuses."""


class EditError(SlashpatchError, ValueError):
    """An edit that is misspelt, has a wrong argument, or does not fit the model."""


class PatchError(SlashpatchError, RuntimeError):
    """A patch that did not act, or would have mixed edited and unedited state."""


class FusedError(SlashpatchError, RuntimeError):
    """Something asked of the fused engine that it cannot do, such as showing a whole pattern."""


class ScanError(SlashpatchError, ValueError):
    """A scan that cannot be computed, merged or loaded."""


class MetricError(SlashpatchError, ValueError):
    """A metric that is misspelt, or whose values are of the wrong shape or not finite."""


class ControlError(SlashpatchError, ValueError):
    """A control that is misspelt, or that cannot be drawn for an edit."""


class SweepError(SlashpatchError, RuntimeError):
    """A sweep that cannot go on: its file is another run's, or no sweep's."""


class TheoryError(SlashpatchError, ValueError):
    """A setting of the shallow transformer that does not fit, or a checkpoint of another."""


class DownloadError(SlashpatchError, RuntimeError):
    """The default model could not be fetched, or is not the file that was expected."""


class OutputError(SlashpatchError, OSError):
    """A path that cannot be written."""
