"""Mutants of a saved graph, and handmade hostile ones: each gives a CacheError, or loads and replays without a crash.

A mutant whose digest still fits is another graph, which may fail with an op's own error when it is replayed; what it
may never do is raise anything but CacheError from `load`, run an op there, reach beyond memory, or end the process.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

from graph_capture import CacheError, FusionConfig, fuse, load, record

ENTRY = "graph_capture"
NAMES = (
    "aten.manual_seed.default", "aten.bernoulli_.float", "aten.from_file.default", "aten.add.int", "external",
    "aten.embedding_dense_backward.default", "aten.resize_.default", "aten.set_.source_Tensor", "aten.relu_.default",
    "aten._index_put_impl_.default", "aten.rand.default", "aten._print.default", "aten.save.default", "values",
    "prim.Print.default", "shape", "fused.pointwise", "guard.aten.item.default", "aten.zero_.default",
    "aten.native_layer_norm_backward.default",
)  # fmt: skip
VALUES = (
    0,
    1,
    -1,
    2,
    7,
    2**31,
    2**62,
    2**63 - 1,
    2**64,
    -(2**63),
    1.5,
    "",
    "x0",
    "v0",
    None,
    True,
    [],
    {},
    [[]],
    {"arg": 9},
)


def example(folder: Path, kind: str) -> tuple[Path, tuple[torch.Tensor, ...], Any]:
    """A saved graph with kernels, its arguments, and what a replay gives."""
    weight, bias, table = torch.randn(6, 8), torch.randn(6), torch.randn(9, 8)

    def rows(x: torch.Tensor, ids: torch.Tensor) -> Any:
        hidden = F.rms_norm(x + F.embedding(ids, table), (8,)) * 2
        return torch.relu(F.linear(hidden, weight, bias)) * 3 + 1, hidden.sum(-1)

    def attention(x: torch.Tensor, ids: torch.Tensor) -> Any:
        heads = x.view(1, 4, 2, 4).transpose(1, 2)
        return F.scaled_dot_product_attention(heads, heads, heads) * 2, ids.float() * 2 + 1

    function = {"rows": rows, "attention": attention}[kind]
    arguments = torch.randn(4, 8), torch.randint(0, 9, (4,))
    with torch.no_grad(), record(*arguments) as recording:
        recording.output(function(*arguments))
    path = folder / f"{kind}.safetensors"
    fused = fuse(recording.graph, FusionConfig(profile="always", target="c"))
    fused.save(path)
    return path, arguments, fused(*arguments)


def parts_of(path: Path) -> tuple[Any, dict[str, torch.Tensor]]:
    """The JSON and the tensors of a file."""
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()[ENTRY]), load_file(path)


def write(path: Path, table: Any, tensors: dict[str, torch.Tensor]) -> None:
    """A file whose digest fits."""
    content = json.dumps(table)
    digest = hashlib.sha256(content.encode()).hexdigest()
    save_file(tensors, path, {ENTRY: content, f"{ENTRY}_digest": digest})


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield from _places(value[key], (*path, key))


def mutant(table: Any, chance: random.Random) -> Any:
    """`table` with one to three things in it that are others."""
    table = copy.deepcopy(table)
    for _ in range(chance.choice((1, 1, 2, 3))):
        places = [place for place in _places(table) if place]
        place = chance.choice(places)
        target = table
        for step in place[:-1]:
            target = target[step]
        now, how = target[place[-1]], chance.random()
        if how < 0.15 and isinstance(target, dict):
            del target[place[-1]]
        elif how < 0.3:
            source = table
            for step in chance.choice(places):
                source = source[step] if isinstance(source, (dict, list)) and _has(source, step) else source
            target[place[-1]] = copy.deepcopy(source)
        elif how < 0.45 and isinstance(now, str):
            target[place[-1]] = chance.choice((*NAMES, now + "x", now[:-1]))
        elif how < 0.7 and type(now) is int:
            target[place[-1]] = now + chance.choice((-1, 1, 8, -8, 2**20))
        elif how < 0.8 and isinstance(now, list) and now:
            chance.shuffle(now)
        else:
            target[place[-1]] = copy.deepcopy(chance.choice(VALUES))
    return table


def _has(value: Any, key: Any) -> bool:
    return key in value if isinstance(value, dict) else isinstance(key, int) and key < len(value)


class OnlyReads(TorchDispatchMode):
    """Notes the ops that compute on real memory, but for what brings a file's tensors there."""

    allowed = (
        "clone",
        "_to_copy",
        "detach",
        "view",
        "empty",
        "set_",
        "reshape",
        "as_strided",
        "copy_",
        "cat",
        "split",
        "select",
        "lift_fresh",
    )

    def __init__(self) -> None:
        super().__init__()
        self.ran: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        made = [t for t in (result if isinstance(result, (tuple, list)) else [result]) if isinstance(t, torch.Tensor)]
        real = any(not tensor.is_meta for tensor in made)
        name = func._schema.name.partition("::")[2]
        if real and not name.startswith(self.allowed):
            self.ran.append(name)
        return result


def attempt(path: Path, arguments: tuple[torch.Tensor, ...]) -> str:
    """How a file ends: "refused", "failed" (an op's own error at the replay), or "replayed"."""
    state, reads = torch.get_rng_state(), OnlyReads()
    try:
        with reads:
            loaded = load(path, config=FusionConfig(profile="static", target="c"))
    except CacheError:
        return "refused"
    finally:
        assert torch.equal(state, torch.get_rng_state()), "loading has changed the random generator"
        assert not reads.ran, f"loading has run {', '.join(reads.ran)}"
    with contextlib.suppress(Exception), torch.no_grad():
        for _ in range(3):
            loaded(*(argument.clone() for argument in arguments))
        return "replayed"
    return "failed"
