"""Language models: sessions of captured prefill and decode steps, and the engine that answers prompts with them."""

from graph_capture.runtime.llm.accelerate import accelerate, unaccelerate
from graph_capture.runtime.llm.completion import Completion, TokenLogprobs
from graph_capture.runtime.llm.engine import InferEngine, InferEnginePython
from graph_capture.runtime.llm.sampling import Sampling

__all__ = [
    "Completion",
    "InferEngine",
    "InferEnginePython",
    "Sampling",
    "TokenLogprobs",
    "accelerate",
    "unaccelerate",
]
