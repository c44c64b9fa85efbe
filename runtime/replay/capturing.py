"""What captures: CUDA graphs, or a stand-in for them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch

Body = Callable[[], list[torch.Tensor]]


class Backend(Protocol):
    """What captures."""

    device_type: str

    def beside(self) -> contextlib.AbstractContextManager[Any]:
        """A stream of its own for everything inside, ordered with the current one."""

    def capture(self, body: Body) -> tuple[list[torch.Tensor], Callable[[], None]]:
        """What `body` returns, and a function that computes it again in the same memory. Nothing is computed yet."""

    def allocated(self) -> int:
        """Bytes of memory in use, without what is only kept in reserve."""


class Cuda:
    """CUDA graphs with one private pool.

    Graphs may share it, for no two replay at once (`graph_capture.runtime.replay.memory.Memory`), and what a graph
    returns, or hands on to a later piece, is held for as long as the graph is there: only memory within a replay serves
    again. It holds what ops allocate themselves; everything else has a place in an arena.
    """

    device_type = "cuda"

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()

    @contextlib.contextmanager
    def beside(self) -> Iterator[None]:
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            yield
        current.wait_stream(self._stream)

    def capture(self, body: Body) -> tuple[list[torch.Tensor], Callable[[], None]]:
        graph = torch.cuda.CUDAGraph()
        # A workspace that cuBLAS had before lies outside the pool and may be freed while the graph lives: torch.compile
        # frees all of them. So does this, that the graph's own lies in the pool.
        torch._C._cuda_clearCublasWorkspaces()
        try:
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                results = body()
        finally:
            torch._C._cuda_clearCublasWorkspaces()
        return results, graph.replay

    def allocated(self) -> int:
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved()
