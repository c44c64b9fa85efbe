"""The C target: specs as C, compiled by the system's compiler, for the CPU.

Imports `graph_capture.codegen.spec`, the launch protocols, and what lies below them.
"""
