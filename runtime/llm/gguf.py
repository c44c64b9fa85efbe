"""Models in GGUF files: their weights stay in the file, packed and memory-mapped.

Names of tensors, configuration and tokenizer are transformers' business. Before it, or the `gguf` package, sees a file,
the header is read here, with every count, length and offset held against the file's size.
"""

from __future__ import annotations

import itertools
import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch

from graph_capture.errors import CaptureError
from graph_capture.ir.quantised import FORMATS, decoded
from graph_capture.log import log
from graph_capture.runtime.llm.packed import PackedEmbedding, PackedLinear, pack_module, packable

FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
MOST_BUFFERS = 2**30  # bytes of what a model computes of its configuration
_SCALARS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # bytes, by the number of the type
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True)
class Stored:
    """A tensor of a file: `shape` as torch has it, and `size` bytes from `offset` on, of the type `kind`."""

    name: str
    kind: str
    shape: tuple[int, ...]
    offset: int
    size: int


@dataclass(frozen=True)
class Contents:
    """What a file says of itself: strings among its metadata, and its tensors by name."""

    strings: Mapping[str, str]
    tensors: Mapping[str, Stored]


def gguf_file(name: str) -> Path | None:
    """The GGUF file that is meant by `name`: itself, or the one in a folder that has no model of another kind.

    Raises:
        CaptureError: the folder has several.
    """
    path = Path(name)
    if path.suffix.lower() == ".gguf":
        return path
    if not path.is_dir() or (path / "config.json").exists():
        return None
    files = sorted(file for file in path.iterdir() if file.suffix.lower() == ".gguf")
    if len(files) > 1:
        raise CaptureError(f"{name} has several models: name one of {', '.join(file.name for file in files)}")
    return files[0] if files else None


class _Header:
    """Reads a header, and never beyond the file."""

    def __init__(self, data: mmap.mmap | bytes) -> None:
        self.data, self.at = data, 0

    def take(self, size: int) -> bytes:
        if size > len(self.data) - self.at:
            raise CaptureError(f"it ends within its header: {size} bytes are wanted at {self.at} of {len(self.data)}")
        self.at += size
        return self.data[self.at - size : self.at]

    def number(self, kind: str) -> int:
        (value,) = struct.unpack(f"<{kind}", self.take(struct.calcsize(kind)))
        return int(value)

    def count(self, of: str, least: int) -> int:
        """How many of something that takes at least so many bytes."""
        value = self.number("Q")
        if value * least > len(self.data) - self.at:
            raise CaptureError(f"it says that it has {value} {of}, for which it is too short")
        return value

    def text(self) -> str:
        try:
            return self.take(self.count("characters", 1)).decode()
        except UnicodeDecodeError as error:
            raise CaptureError(f"a name at {self.at} is no UTF-8") from error

    def value(self) -> str | int | None:
        """A string, or an integer of 32 bits; None for what is of another type."""
        kind = self.number("I")
        if kind == _STRING:
            return self.text()
        if kind == _ARRAY:
            inner = self.number("I")
            if inner == _STRING:
                for _ in range(self.count("strings", 8)):
                    self.take(self.count("characters", 1))
                return None
            self.take(self._size(inner) * self.count("values", self._size(inner)))
            return None
        raw = self.take(self._size(kind))
        return int.from_bytes(raw, "little") if kind == 4 else None

    def _size(self, kind: int) -> int:
        if kind not in _SCALARS:
            raise CaptureError(f"a value at {self.at} is of the type {kind}, which GGUF has not (or not in an array)")
        return _SCALARS[kind]


def contents(path: Path) -> Contents:
    """What the header of a file says, checked.

    Raises:
        CaptureError: it is no GGUF file of version 2 or 3, is damaged or cut short, or a tensor is of a type unknown
            to the `gguf` package, or that is not installed.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _read(_Header(data))
    except (OSError, ValueError) as error:
        raise CaptureError(f"{path} cannot be read as a GGUF file: {error}") from error
    except CaptureError as error:
        raise CaptureError(f"{path} is no sound GGUF file: {error}") from error


def _read(header: _Header) -> Contents:
    kinds, sizes = _types()
    if header.take(4) != b"GGUF":
        raise CaptureError("it does not begin with GGUF")
    version = header.number("I")
    if version not in (2, 3):
        big = "; it is of the other byte order" if version & 0xFFFF == 0 else ""
        raise CaptureError(f"its version is {version}, not 2 or 3{big}")
    tensors, pairs = header.count("tensors", 24), header.count("values", 13)
    values: dict[str, str | int | None] = {}
    for _ in range(pairs):
        key = header.text()
        if key in values:
            raise CaptureError(f"it has {key} twice")
        values[key] = header.value()
    alignment = values.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise CaptureError(f"its alignment is {alignment!r}, no power of two")
    listed = []
    for _ in range(tensors):
        name, rank = header.text(), header.number("I")
        if not 1 <= rank <= 4:
            raise CaptureError(f"{name} has {rank} dimensions")
        shape = tuple(header.number("Q") for _ in range(rank))[::-1]
        listed.append((name, shape, header.number("I"), header.number("Q")))
    start = -(-header.at // alignment) * alignment
    found: dict[str, Stored] = {}
    for name, shape, number, offset in listed:
        if number not in kinds:
            raise CaptureError(f"{name} is of the type {number}, which is unknown: a newer gguf package may know it")
        kind = kinds[number]
        block, width = sizes[kind]
        elements = math.prod(shape)
        if not elements or shape[-1] % block or offset % alignment:
            raise CaptureError(f"{name} is {list(shape)} at {offset}, which {kind} does not allow")
        size = elements // block * width
        if start + offset + size > len(header.data):
            raise CaptureError(
                f"{name} ends at {start + offset + size}, beyond the {len(header.data)} bytes of the file"
            )
        if name in found:
            raise CaptureError(f"it has {name} twice")
        found[name] = Stored(name, kind, shape, start + offset, size)
    ordered = sorted(found.values(), key=lambda stored: stored.offset)
    for one, other in itertools.pairwise(ordered):
        if one.offset + one.size > other.offset:
            raise CaptureError(f"{one.name} and {other.name} overlap")
    return Contents({key: value for key, value in values.items() if isinstance(value, str)}, found)


def _types() -> tuple[dict[int, str], dict[str, tuple[int, int]]]:
    """The names of types by number; weights of a block, and its bytes, by name."""
    try:
        from gguf import GGML_QUANT_SIZES
    except ImportError as error:
        raise CaptureError("GGUF files need the gguf package: pip install 'graph-capture[gguf]'") from error
    return {int(kind): kind.name for kind in GGML_QUANT_SIZES}, {k.name: v for k, v in GGML_QUANT_SIZES.items()}


def load_gguf(path: Path, config: Any, transformers: Any, *, dtype: torch.dtype, device: str) -> Any:
    """The causal language model in a file, in evaluation mode.

    Linears and embeddings keep the file's blocks, which are read from it as they are needed; on another device than
    the CPU they are copied. All else is unpacked to `dtype`.

    Args:
        config: of transformers, from the same file.

    Raises:
        CaptureError: the file is damaged or does not fit its configuration, transformers does not know its
            architecture, or it has a format that is not in `FORMATS`.
    """
    held = contents(path)
    strange = next((t for t in held.tensors.values() if t.kind not in FORMATS and t.kind not in FLOATS), None)
    if strange is not None:
        known = ", ".join([*FORMATS, *FLOATS])
        raise CaptureError(
            f"{path}: {strange.name} is {strange.kind}, which is not supported; there are {known}. Take the model in "
            "one of these, or let transformers unpack it (from_pretrained(gguf_file=...)) and pass that"
        )
    layers = getattr(config.get_text_config(decoder=True), "num_hidden_layers", 0)
    if layers > len(held.tensors):
        raise CaptureError(f"{path} says that it has {layers} layers, and has {len(held.tensors)} tensors")
    with torch.device("meta"):
        plan = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    file = _Mapped(path, held, plan)
    file.check(plan)
    from transformers.initialization import no_init_weights

    with no_init_weights():
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    for stored, target in file.targets:
        file.put(model, stored, target)
    _tie(model)
    return model.eval().to(device)


class _Mapped:
    """The tensors of a file, and where they go in a model of transformers."""

    def __init__(self, path: Path, held: Contents, plan: Any) -> None:
        from transformers.modeling_gguf_pytorch_utils import (
            TENSOR_PROCESSORS,
            TensorProcessor,
            get_gguf_hf_weights_map,
        )

        self.path = path
        kind = TENSOR_PROCESSORS.get(held.strings.get("general.architecture", ""), TensorProcessor)
        self._processor = kind(config=plan.config.to_dict())
        self._names: dict[str, str] = get_gguf_hf_weights_map(plan, self._processor)
        self._bytes = torch.from_numpy(numpy.memmap(path, mode="c"))  # copied where it is written: it never is
        self.targets = [(held.tensors[name], self._names[name]) for name in held.tensors if name in self._names]
        unused = [name for name in held.tensors if name not in self._names]
        if unused:
            log.warning("%s has %s, which transformers' %s has not", path, ", ".join(unused), type(plan).__name__)

    def check(self, plan: Any) -> None:
        """Whether the file is what the configuration says, before anything is made of either.

        Raises:
            CaptureError: a parameter is missing, or has another shape.
        """
        known = dict(plan.named_parameters(remove_duplicate=False))
        tied = {"lm_head.weight"} if plan.config.get_text_config(decoder=True).tie_word_embeddings else set()
        missing = sorted(known.keys() - tied - {target for _, target in self.targets})
        if missing:
            raise CaptureError(f"{self.path} has no {', '.join(missing[:5])}, which its architecture needs")
        for stored, target in self.targets:
            if target in known and math.prod(stored.shape) != known[target].numel():
                raise CaptureError(
                    f"{self.path}: {stored.name} is {list(stored.shape)}, and {list(known[target].shape)} by the "
                    "configuration"
                )
        buffers = sum(buffer.nbytes for buffer in plan.buffers())
        if buffers > MOST_BUFFERS:
            raise CaptureError(f"{self.path}: its configuration asks for buffers of {buffers} bytes")

    def put(self, model: Any, stored: Stored, target: str) -> None:
        """Give the model a tensor: packed, or unpacked where its module is not one that can have it packed."""
        if stored.kind in FORMATS and len(stored.shape) > 2:
            raise CaptureError(
                f"{self.path}: {stored.name} is the {stored.kind} weight of several experts, which are not supported "
                "packed: let transformers unpack the model (from_pretrained(gguf_file=...)) and pass that"
            )
        owner, _, leaf = target.rpartition(".")
        module = model.get_submodule(owner)
        order = self._order(stored) if stored.kind in FORMATS and leaf == "weight" and packable(module) else None
        if order is not None:
            rows = self._raw(stored).view(stored.shape[0], -1)
            moved = rows if order.equal(torch.arange(len(order))) else rows[order]
            pack_module(model, owner, torch.nn.Parameter(moved, requires_grad=False), stored.kind)
            return
        parameter = getattr(module, leaf)
        result = self._processed(stored.name, self._unpacked(stored).numpy())
        with torch.no_grad():
            parameter.copy_(torch.from_numpy(numpy.ascontiguousarray(result)).view_as(parameter))

    def _raw(self, stored: Stored) -> torch.Tensor:
        return self._bytes[stored.offset : stored.offset + stored.size]

    def _unpacked(self, stored: Stored) -> torch.Tensor:
        """As float32."""
        raw = self._raw(stored)
        if stored.kind in FORMATS:
            return decoded(raw.view(math.prod(stored.shape[:-1]), -1), stored.kind).view(stored.shape)
        return raw.clone().view(FLOATS[stored.kind]).to(torch.float32).view(stored.shape)

    def _processed(self, name: str, array: numpy.ndarray) -> numpy.ndarray:
        """What transformers makes of a tensor that it loads, such as its rows in another order."""
        result = self._processor.process(
            weights=array, name=name, tensor_key_mapping=self._names, parsed_parameters={"tensors": {}}
        )
        if result.name != name:
            raise CaptureError(f"{self.path}: {name} is not one parameter of transformers' model, and not supported")
        made: numpy.ndarray = result.weights
        return made

    def _order(self, stored: Stored) -> torch.Tensor | None:
        """The order in which transformers takes a weight's rows, by a stand-in; None if it does more to it."""
        count = stored.shape[0]
        sample = numpy.arange(2 * count).reshape(count, 2)
        made = self._processed(stored.name, sample)
        if made.shape != sample.shape or not (made == sample[numpy.clip(made[:, 0] // 2, 0, count - 1)]).all():
            return None
        order = torch.from_numpy(made[:, 0] // 2)
        return order if order.sort().values.equal(torch.arange(count)) else None


def _tie(model: Any) -> None:
    """Let the head have the embedding's weight, where the configuration says so."""
    if not model.config.get_text_config(decoder=True).tie_word_embeddings:
        return
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if isinstance(embedding, PackedEmbedding):
        model.set_output_embeddings(PackedLinear(embedding.packed, embedding.scheme, getattr(head, "bias", None)))
    elif isinstance(head, torch.nn.Linear):
        head.weight = embedding.weight
