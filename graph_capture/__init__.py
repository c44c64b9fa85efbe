"""graph_capture: record a PyTorch forward pass, fuse it, replay it, with receipts."""

from importlib.metadata import version

from graph_capture import testing
from graph_capture.codegen import CompiledKernel, KernelCompiler, Target, register_target, unregister_target
from graph_capture.codegen.spec.definitions import register_op, unregister_op
from graph_capture.errors import (
    CacheError,
    CaptureError,
    DataDependentError,
    FusionError,
    SignatureMismatchError,
    UnrecordedWriteError,
)
from graph_capture.ir.graph import OpNode, SubGraph, check_subgraph
from graph_capture.ir.values import TensorMeta
from graph_capture.log import configure
from graph_capture.passes import (
    create_add_rms_norm_pattern,
    create_geglu_pattern,
    create_swiglu_pattern,
    pattern,
    spelling,
    unregister_spelling,
)
from graph_capture.record.convert import convert_recorded_graph_to_subgraph
from graph_capture.record.recorded import RecordedGraph
from graph_capture.record.recorder import record, start_graph_recording, stop_graph_recording
from graph_capture.runtime.capture.buckets import Bucket
from graph_capture.runtime.capture.capture import capture
from graph_capture.runtime.config import FusionConfig
from graph_capture.runtime.decide.heuristics import FusionHeuristics
from graph_capture.runtime.doctor import Diagnosis, doctor
from graph_capture.runtime.fuse import FusionScheduler, fuse
from graph_capture.runtime.fused import FusedGraph
from graph_capture.runtime.llm import InferEngine, InferEnginePython, accelerate, unaccelerate
from graph_capture.runtime.llm.models import register_architecture, unregister_architecture
from graph_capture.runtime.llm.packed import quantize
from graph_capture.runtime.load import load

configure()

__version__ = version("graph-capture")

__all__ = [
    "Bucket",
    "CacheError",
    "CaptureError",
    "CompiledKernel",
    "DataDependentError",
    "Diagnosis",
    "FusedGraph",
    "FusionConfig",
    "FusionError",
    "FusionHeuristics",
    "FusionScheduler",
    "InferEngine",
    "InferEnginePython",
    "KernelCompiler",
    "OpNode",
    "RecordedGraph",
    "SignatureMismatchError",
    "SubGraph",
    "Target",
    "TensorMeta",
    "UnrecordedWriteError",
    "accelerate",
    "capture",
    "check_subgraph",
    "convert_recorded_graph_to_subgraph",
    "create_add_rms_norm_pattern",
    "create_geglu_pattern",
    "create_swiglu_pattern",
    "doctor",
    "fuse",
    "load",
    "pattern",
    "quantize",
    "record",
    "register_architecture",
    "register_op",
    "register_target",
    "spelling",
    "start_graph_recording",
    "stop_graph_recording",
    "testing",
    "unaccelerate",
    "unregister_architecture",
    "unregister_op",
    "unregister_spelling",
    "unregister_target",
]
