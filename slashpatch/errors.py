"""Error classes. Each message says what was expected, what was given, and what to do."""

from __future__ import annotations


class SlashpatchError(Exception):
    """Base class of all errors that slashpatch raises itself."""


class HeadError(SlashpatchError, ValueError):
    """Raised for a head name that cannot be parsed, or a head that the model does not have."""


class OffsetError(SlashpatchError, ValueError):
    """Raised for an offset that is negative, not an integer, or too large for the context."""


class BandError(SlashpatchError, ValueError):
    """Raised for a band of rotary pairs that is misspelt, empty, or absent from the head."""


class PromptError(SlashpatchError, ValueError):
    """Raised for prompts that are empty, too long, missing, or of the wrong type."""


class ModelError(SlashpatchError, ValueError):
    """Raised for a model that slashpatch does not support: its message says why."""


class TooLargeError(ModelError, MemoryError):
    """Raised for a model whose weights do not fit the memory that there is."""


class EditError(SlashpatchError, ValueError):
    """Raised for an edit that is misspelt, has a wrong argument, or does not fit the model."""


class PatchError(SlashpatchError, RuntimeError):
    """Raised for a patch that had no effect, or would mix a KV cache with and without the edit."""


class FusedError(SlashpatchError, RuntimeError):
    """Raised where the fused engine cannot do something, such as return a whole pattern."""


class ScanError(SlashpatchError, ValueError):
    """Raised for a scan that cannot be computed, merged or loaded."""


class MetricError(SlashpatchError, ValueError):
    """Raised for a metric that is misspelt, or returns a wrong shape or values not finite."""


class ControlError(SlashpatchError, ValueError):
    """Raised for a control that is misspelt, or that cannot be drawn for an edit."""


class SweepError(SlashpatchError, RuntimeError):
    """Raised for a file that belongs to another sweep, is damaged, or is not a sweep at all."""


class WorkerError(SlashpatchError, RuntimeError):
    """Raised for workers that cannot start, differ from this process, or end too often."""


class EmergenceError(SlashpatchError, ValueError):
    """Raised for a record of training that cannot be made, continued or loaded."""


class ReportError(SlashpatchError, ValueError):
    """Raised for parts that make no report: of another class, or of different models."""


class TheoryError(SlashpatchError, ValueError):
    """Raised for an invalid setting of the shallow transformer, or another run's checkpoint."""


class DownloadError(SlashpatchError, RuntimeError):
    """Raised where the default model cannot be downloaded, or its checksum differs."""


class OutputError(SlashpatchError, OSError):
    """Raised for a path that cannot be written, or a file that is not what it should hold."""


class PlotError(SlashpatchError, ValueError):
    """Raised for an unknown plotting backend, or a result that has nothing to plot."""


class ExtraError(SlashpatchError, ImportError):
    """Raised where a package of one of slashpatch's extras is not installed."""
