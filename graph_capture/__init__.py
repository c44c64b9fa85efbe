"""graph_capture: record a PyTorch forward pass, fuse it, replay it, with receipts."""
