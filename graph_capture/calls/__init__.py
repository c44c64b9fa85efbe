"""What a call looks like: the structure of its arguments, its signature, other libraries' tensors.

Imports `graph_capture.ir` and what lies below it.
"""
