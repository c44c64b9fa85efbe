"""Rewriting the Triton source that ninetoothed generates, and what it is linked with.

Imports neither the package around it nor torch: `aot_worker` loads it alone.
"""
