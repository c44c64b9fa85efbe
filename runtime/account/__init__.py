"""The receipts: what was decided and why, and whether kernels are right.

Imports `graph_capture.runtime.decide` and what lies below it.
"""
