"""What a kernel computes, as frozen descriptions that know no target, and the lowerings that make them.

Imports `graph_capture.ir` and what lies below it.
"""
