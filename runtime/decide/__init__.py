"""Whether a kernel is used: rules, measurements, and where they are kept.

Imports `graph_capture.runtime.replay` and what lies below it.
"""
