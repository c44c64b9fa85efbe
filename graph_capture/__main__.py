"""``python -m graph_capture`` is ``graph-capture``."""

from graph_capture.cli.main import main

main()
