"""Every error that graph_capture raises on purpose. Each says what happened, where, and what to do."""

from __future__ import annotations


class CaptureError(RuntimeError):
    """Base class of all graph_capture errors."""


class DataDependentError(CaptureError):
    """A recorded forward read a tensor's value into Python (``.item()``, ``bool(t)``, ``nonzero``)."""


class UnrecordedWriteError(CaptureError):
    """Memory changed in a way that no recorded op explains."""


class SignatureMismatchError(CaptureError):
    """A replay was called with arguments that differ from the recorded ones in structure, shape, dtype or device."""


class FusionError(CaptureError):
    """A region cannot be made into a kernel; the recorded ops are used instead."""


class CacheError(CaptureError):
    """A saved graph or a cache entry is damaged or was made by something else."""
