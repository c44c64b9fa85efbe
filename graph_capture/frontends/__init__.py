"""Other libraries whose calls are recorded: one folder for each.

Imports `graph_capture.record` and what lies below it; passes and codegen stand beside it and know nothing of it.
"""
