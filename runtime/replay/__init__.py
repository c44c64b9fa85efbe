"""How a graph is replayed: the first run, the planner, the arena, the plan, CUDA graphs.

Imports `graph_capture.runtime.program` and what lies below it.
"""
