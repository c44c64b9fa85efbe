"""The ninetoothed target: specs as ninetoothed programs, compiled by Triton, for CUDA.

Imports `graph_capture.codegen.spec`, the launch protocols, and what lies below them.
"""
