"""The graph: nodes, values, the op table, what ops do to memory, the interpreter, graphs as text.

Imports the errors, the log and the cache only. The op table is filled as soon as anything here is imported.
"""

from graph_capture.ir import convolutions as convolutions
from graph_capture.ir import op_table as op_table
