"""`capture`: a recording for each signature, and padding to few of them.

Imports `graph_capture.runtime.load` and what lies below it.
"""
