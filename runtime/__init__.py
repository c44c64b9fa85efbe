"""From a recorded graph to a fast replay. Each module or folder here imports only those before it:

config, library, region, program, replay, decide, account, save, fused, fuse, load, capture, llm.
"""
