"""Recording what other libraries compute: one module for each library; see `graph_capture.foreign`."""
