"""`FusionConfig`: the knobs of analysis and replay."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, Literal, get_args

from graph_capture.codegen.target import TARGETS
from graph_capture.passes import DEFAULT, Pattern, pass_names

Profile = Literal["measure", "always", "static"]
OpLibrary = Literal["builtin", "ntops"]
CudaGraph = Literal["auto", "off"]
MergeLinears = Literal["views", "copy", "off"]


@dataclass(frozen=True)
class FusionConfig:
    """How a graph is rewritten and when a fused kernel is used.

    Attributes:
        enable_fusion: False replays everything as recorded.
        enable_cache: keep kernels and measured decisions for regions that come again, in this process and later ones.
        cache_dir: where those for later processes are kept; None is what ``GRAPH_CAPTURE_CACHE_DIR`` says, or else the
            user's cache folder.
        fallback_on_error: a region whose kernel cannot be made or fails replays as recorded; False raises.
        debug_mode: log every decision at INFO and check every fused result against the recorded ops.
        max_graph_size: the most ops in one region.
        min_tensor_elements: regions whose largest tensor has fewer elements are left alone.
        min_nodes_for_fusion: the fewest ops that make a region.
        fusion_ratio: a fused kernel is used if ``t_fused < t_fallback * fusion_ratio``.
        profile: "measure" times both and compares; "always" uses every kernel that can be made; "static" uses every
            kernel that is compiled to machine code, untimed.
        target: what makes kernels: "ninetoothed" (Triton), "c" (the system's C compiler, for the CPU), one that
            `register_target` made known, or "auto": the first on CUDA, the second on the CPU.
        op_library: whose definitions of ops kernels are made of: "builtin", or "ntops", which has to be installed; an
            op for which it has none that computes what torch does keeps ours.
        verify_every: check the kernels in use at every so many replays against float64, on copies, and log what is off
            (`FusedGraph.samples` keeps the latest outcomes); 0 checks none.
        merge_linears: linears on one input become one. "views" lets the old weights live on as views of the merged one,
            so that memory does not grow; "copy" leaves them alone; "off" does not merge.
        fold_weights: compute what depends on weights only once, and again when one of them changes. Costs memory
            (`FusedGraph.constant_bytes`). Batch norms are then folded into convolutions in half precision too.
        patterns: the fusions to look for; None is those registered for the process.
        cuda_graph: "auto" replays on a CUDA device as CUDA graphs, once calls come with large arguments at the same
            addresses; "off" launches kernel by kernel.
        graph_memory: the most bytes of device memory that CUDA graphs keep, all signatures of one `capture`, engine or
            scheduler together: those used longest ago go first, and one that needs more by itself is not kept. None
            sets no limit. Intermediate values lie in an arena that graphs and replays without graphs share.
        clone_outputs: False lets results lie in buffers that the next replay overwrites: clone what must outlive it. A
            result of the latest replay may be an argument of the next; an older one raises SignatureMismatchError.
        passes_off: names of passes, spellings and fusions to leave out (`graph_capture.passes.pass_names`).

    Raises:
        ValueError: a value is out of its range.
    """

    enable_fusion: bool = True
    enable_cache: bool = True
    fallback_on_error: bool = True
    debug_mode: bool = False
    max_graph_size: int = 64
    min_tensor_elements: int = 1
    min_nodes_for_fusion: int = 2
    fusion_ratio: float = 0.8
    profile: Profile = "measure"
    target: str = "auto"
    op_library: OpLibrary = "builtin"
    verify_every: int = 0
    merge_linears: MergeLinears = "views"
    fold_weights: bool = False
    patterns: tuple[Pattern, ...] | None = None
    passes_off: frozenset[str] = frozenset()
    clone_outputs: bool = True
    cuda_graph: CudaGraph = "auto"
    graph_memory: int | None = None
    cache_dir: str | os.PathLike[str] | None = None

    def __post_init__(self) -> None:
        _one_of("profile", self.profile, get_args(Profile))
        _one_of("cuda_graph", self.cuda_graph, get_args(CudaGraph))
        _one_of("target", self.target, ("auto", *TARGETS))
        _one_of("op_library", self.op_library, get_args(OpLibrary))
        _one_of("merge_linears", self.merge_linears, get_args(MergeLinears))
        if self.patterns is not None:
            object.__setattr__(self, "patterns", tuple(self.patterns))
        object.__setattr__(self, "passes_off", frozenset(self.passes_off))
        known = pass_names(DEFAULT if self.patterns is None else self.patterns)
        for name in sorted(self.passes_off - frozenset(known)):
            raise ValueError(f"there is no pass {name!r}; there are {', '.join(known)}")
        for name in ("max_graph_size", "min_nodes_for_fusion"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("min_tensor_elements", "verify_every"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.graph_memory is not None and self.graph_memory < 0:
            raise ValueError(f"graph_memory must not be negative, got {self.graph_memory}")
        if not self.fusion_ratio > 0:
            raise ValueError(f"fusion_ratio must be positive, got {self.fusion_ratio}")


def _one_of(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
