"""InfiniCore: its tensors, its calls, and graphs that it records itself.

Imports `graph_capture.record` and what lies below it.
"""

from graph_capture.frontends.infinicore.frontend import to_torch

__all__ = ["to_torch"]
