"""InfiniCore: its tensors, its calls, and graphs that it records itself.

Imports `graph_capture.record` and what lies below it.
"""
