"""A program as one file.

Imports `graph_capture.runtime.account` and what lies below it.
"""
