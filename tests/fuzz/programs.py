"""Random programs over what kernels, spellings and passes know, for each target against the code as it is.

A program is a list of steps over a pool of tensors, the same for the same seed. Tensors know whether their values are
the same in every right way of computing them (`exact`): only of such ones are steps made that turn a rounding into
something else (comparisons, floors, integers). Results are compared with the error in mind that eager itself has
against float64; strides, NaN and infinities as they are.
"""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from graph_capture import CaptureError, FusionConfig, capture

INF = math.inf
FLOATS = (torch.float32, torch.float32, torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
NUMBERS = (0.0, -0.0, 1.0, -1.0, 0.1, 0.3333333333333333, 2.0, 3.5, -7.25, 1e-6, 60000.0, 1e5)
WHOLE = (0, 1, -1, 3, 100, 127, 128, 200, 255, 256, 300, -5, 2**15, 2**31 - 1)


@dataclass
class Value:
    """A tensor of the program: its name, an example, whether its values are the same however they are computed, and
    the rounding of the coarsest dtype on the way to it."""

    name: str
    example: torch.Tensor
    exact: bool = True
    rounding: float = 0.0


Step = tuple[str, tuple[str, ...], Callable[..., Any]]


class Program:
    """A program from a seed: `inputs` by name, `steps`, and the names of what is returned."""

    def __init__(self, seed: int, length: int = 6) -> None:
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.pool: list[Value] = []
        self.steps: list[Step] = []
        self.inputs: dict[str, torch.Tensor] = {}
        self.texts: list[str] = []
        for _ in range(self.random.choice((1, 2, 2, 3))):
            self._input()
        while len(self.steps) < length:
            self.random.choice(STEPS)(self)
        made = [value for value in self.pool if value.name not in self.inputs]
        last = made[-1:] + [value for value in made[:-1] if self.random.random() < 0.3]
        self.returned = [value.name for value in last]

    def __call__(self, *arguments: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Run it."""
        env = dict(zip(self.inputs, arguments, strict=True))
        for name, reads, function in self.steps:
            env[name] = function(*(env[read] for read in reads))
        return tuple(env[name] for name in self.returned)

    def __str__(self) -> str:
        given = [f"{n}: {t.dtype} {tuple(t.shape)} {t.stride()}" for n, t in self.inputs.items()]
        return "\n".join([*given, *self.texts, f"returns {', '.join(self.returned)}"])

    # --- what steps are made of

    def add(self, text: str, reads: list[Value], function: Callable[..., Any], exact: bool = False) -> None:
        """A step, if it runs and its result is not too large."""
        try:
            example = function(*(value.example for value in reads))
        except (RuntimeError, IndexError, ValueError, TypeError, NotImplementedError):
            return
        if not isinstance(example, torch.Tensor) or example.numel() > 20_000 or example.dim() > 5:
            return
        name = f"v{len(self.steps)}"
        exact = exact and all(value.exact for value in reads)
        own = torch.finfo(example.dtype).eps if _real(example) else 0.0
        rounding = 0.0 if exact else max(own, *(value.rounding for value in reads))
        self.pool.append(Value(name, example, exact, rounding))
        self.steps.append((name, tuple(value.name for value in reads), function))
        shown = f"{example.dtype} {tuple(example.shape)} {example.stride()}"
        self.texts.append(f"{name} = {text}({', '.join(v.name for v in reads)})  # {shown}")

    def pick(self, wanted: Callable[[torch.Tensor], bool] = lambda t: True, exact: bool = False) -> Value | None:
        """One of the pool, the latest preferred."""
        fitting = [value for value in self.pool if wanted(value.example) and (value.exact or not exact)]
        if not fitting:
            return None
        return fitting[-1] if self.random.random() < 0.5 else self.random.choice(fitting)

    def noise(self, shape: tuple[int, ...], dtype: torch.dtype, odd: float = 0.25) -> torch.Tensor:
        """Values of a dtype, with some zeros, infinities and NaN among them."""
        if dtype is torch.bool:
            return torch.rand(shape, generator=self.generator) > 0.5
        if not dtype.is_floating_point and not dtype.is_complex:
            low, high = (0, 255) if dtype is torch.uint8 else (-120, 120)
            return torch.randint(low, high, shape, generator=self.generator, dtype=torch.int64).to(dtype)
        made = torch.randn(shape, generator=self.generator, dtype=torch.float64)
        if self.random.random() < odd and made.numel():
            values = torch.tensor([0.0, -0.0, INF, -INF, math.nan, 1e-30, 1e30], dtype=torch.float64)
            at = torch.randint(0, made.numel(), (3,), generator=self.generator)
            made.view(-1)[at] = values[torch.randint(0, 7, (3,), generator=self.generator)]
        return made.to(dtype)

    def _input(self) -> None:
        rank = self.random.choice((0, 1, 2, 2, 3, 3, 4))
        shape = tuple(self.random.choice((1, 2, 3, 4, 5, 8, 16, 33)) for _ in range(rank))
        dtype = self.random.choice((*FLOATS, *FLOATS, *INTEGERS, torch.bool, torch.complex64))
        tensor = self.noise(shape, dtype)
        how = self.random.random()
        if rank > 1 and how < 0.2:
            tensor = self.noise((*shape[:-2], shape[-1], shape[-2]), dtype).transpose(-1, -2)
        elif rank > 0 and how < 0.35:
            tensor = self.noise((*shape[:-1], 2 * shape[-1]), dtype)[..., ::2]
        elif rank > 0 and how < 0.5:
            dim = self.random.randrange(rank)
            tensor = self.noise((*shape[:dim], 1, *shape[dim + 1 :]), dtype).expand(shape)
        self._give(tensor)

    def _give(self, tensor: torch.Tensor) -> Value:
        name = f"x{len(self.inputs)}"
        self.inputs[name] = tensor
        self.pool.append(Value(name, tensor))
        return self.pool[-1]

    def fresh(self, shape: tuple[int, ...], dtype: torch.dtype) -> Value:
        """One more argument, of finite values: a library's masks do not hide what is not finite."""
        return self._give(self.noise(shape, dtype, odd=0.0))


def _real(tensor: torch.Tensor) -> bool:
    return tensor.dtype.is_floating_point


def _rows(tensor: torch.Tensor) -> bool:
    return _real(tensor) and tensor.dim() > 0 and tensor.shape[-1] > 0


# --- kinds of steps


def pointwise(program: Program) -> None:
    value = program.pick(_real)
    if value is None:
        return
    exact: dict[str, Callable[..., Any]] = {
        "neg": torch.neg, "abs": torch.abs, "relu": torch.relu, "square": torch.square, "reciprocal": torch.reciprocal,
        "clamp": lambda x: x.clamp(-1.0, 0.5), "clamp_min": lambda x: x.clamp(min=0.0), "cube": lambda x: x.pow(3),
        "clamp_max": lambda x: x.clamp(max=0.25),
    }  # fmt: skip
    rounded: dict[str, Callable[..., Any]] = {
        "silu": F.silu, "gelu": lambda x: F.gelu(x.clamp(-1e4, 1e4)), "sigmoid": torch.sigmoid, "tanh": torch.tanh,
        "gelu_tanh": lambda x: F.gelu(x.clamp(-1e4, 1e4), approximate="tanh"), "sqrt": lambda x: x.abs().sqrt(),
        "exp": lambda x: x.clamp(-20, 20).exp(), "log": lambda x: (x.abs() + 0.5).log(),
        "sin": lambda x: x.clamp(-9, 9).sin(),
        "rsqrt": lambda x: (x.abs() + 0.1).rsqrt(), "erf": torch.erf, "softplus": F.softplus,
        "log1p": lambda x: x.abs().log1p(),
        "pow": lambda x: x.abs().clamp(max=50).pow(1.5), "pow5": lambda x: x.clamp(-9, 9).pow(5),
        "pow-3": lambda x: x.pow(-3),
        "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x), "relu2": lambda x: torch.relu(x.clamp(max=90)).square(),
        "softcap": lambda x: torch.tanh(x / 30.0) * 30.0,
    }  # fmt: skip
    name = program.random.choice([*exact, *rounded])
    program.add(name, [value], exact.get(name) or rounded[name], name in exact)


def scalar(program: Program) -> None:
    value = program.pick()
    if value is None:
        return
    whole = not (_real(value.example) or value.example.is_complex())
    number = program.random.choice(WHOLE if whole else NUMBERS)
    name, function = program.random.choice(
        [
            ("+", lambda x: x + number),
            ("-", lambda x: x - number),
            ("*", lambda x: x * number),
            ("/", lambda x: x / (number or 1)),
            ("rsub", lambda x: number - x),
            ("maximum", lambda x: torch.where(x > 0, x, number)),
        ]
    )
    if name != "maximum" or value.exact:  # a choice
        program.add(f"{name} {number}", [value], function, True)


def binary(program: Program) -> None:
    first, second = program.pick(), program.pick()
    if first is None or second is None:
        return
    if program.random.random() < 0.3 and first.example.dim() and second.example.dim():  # pairwise

        def against(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return x[:, None] - y[None]

        program.add("pairwise", [first, second], against, True)
        return
    choices: list[tuple[str, Callable[..., Any]]] = [
        ("add", torch.add), ("sub", torch.sub), ("mul", torch.mul), ("maximum", torch.maximum),
        ("minimum", torch.minimum),
        ("and", torch.bitwise_and), ("or", torch.bitwise_or), ("xor", torch.bitwise_xor),
        ("logical_and", torch.logical_and), ("axpy", lambda x, y: torch.add(x, y, alpha=3)),
    ]  # fmt: skip
    name, function = program.random.choice(choices)
    if not name.startswith("logical") or (first.exact and second.exact):
        program.add(name, [first, second], function, name != "axpy")


def compare(program: Program) -> None:
    value = program.pick(lambda t: not t.is_complex(), exact=True)
    if value is None:
        return
    number = program.random.choice(NUMBERS if _real(value.example) else WHOLE)
    name = program.random.choice(("gt", "ge", "lt", "le", "eq", "ne"))
    kind = program.random.random()
    if kind < 0.5:
        program.add(f"{name} {number}", [value], lambda x: getattr(torch, name)(x, number), True)
    elif kind < 0.75 and _real(value.example):
        step = program.random.choice((torch.floor, torch.ceil, torch.trunc))
        program.add(step.__name__, [value], step, True)
    else:
        program.add("masked_fill", [value], lambda x: x.masked_fill(x > 0, 0.5 if _real(x) else 7), True)


def cast(program: Program) -> None:
    value = program.pick(lambda t: not t.is_complex())
    if value is None:
        return
    dtype = program.random.choice(
        (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int32, torch.bool)
    )
    if not dtype.is_floating_point and not value.exact:
        return
    if dtype is torch.int32 and _real(value.example):  # what is too large is anybody's
        program.add("to int32", [value], lambda x: x.nan_to_num(0.0, 9.0, -9.0).clamp(-1e4, 1e4).to(dtype), True)
        return
    program.add(f"to {dtype}", [value], lambda x: x.to(dtype), True)
    if program.random.random() < 0.4 and dtype.is_floating_point:
        program.add("back", [program.pool[-1]], lambda x: x.to(torch.float32), True)


def reduce(program: Program) -> None:
    value = program.pick(_rows)
    if value is None:
        return
    dim = -1 if program.random.random() < 0.8 else program.random.randrange(value.example.dim())
    keep = program.random.random() < 0.5
    choices: dict[str, Callable[..., Any]] = {
        "sum": lambda x: x.sum(dim, keepdim=keep), "mean": lambda x: x.mean(dim, keepdim=keep),
        "amax": lambda x: x.amax(dim, keepdim=keep), "amin": lambda x: x.amin(dim, keepdim=keep),
        "var": lambda x: x.var(dim, unbiased=False, keepdim=keep), "softmax": lambda x: F.softmax(x, dim),
        "log_softmax": lambda x: F.log_softmax(x, dim), "logsumexp": lambda x: torch.logsumexp(x, dim, keepdim=keep),
        "sum of squares": lambda x: (x * x).sum(dim, keepdim=keep),
    }  # fmt: skip
    name = program.random.choice([*choices])
    program.add(f"{name} {dim} {keep}", [value], choices[name], name in ("amax", "amin"))


def view(program: Program) -> None:
    value = program.pick()
    if value is None:
        return
    choices: dict[str, Callable[..., Any]] = {
        "t": lambda x: x.transpose(-1, -2), "swap": lambda x: x.transpose(0, -1),
        "unsqueeze": lambda x: x.unsqueeze(-2),
        "flatten": lambda x: x.reshape(-1), "half": lambda x: x[..., : x.shape[-1] // 2 + 1],
        "step": lambda x: x[..., ::2],
        "first": lambda x: x[0], "wide": lambda x: x.unsqueeze(0).expand(3, *x.shape), "flip": lambda x: x.flip(0),
        "contiguous": lambda x: x.contiguous(), "permute": lambda x: x.permute(*reversed(range(x.dim()))),
        "cat": lambda x: torch.cat((x, x), -1), "chunk": lambda x: x.chunk(2, -1)[-1], "squeeze": lambda x: x.squeeze(),
    }  # fmt: skip
    name = program.random.choice([*choices])
    program.add(name, [value], choices[name], True)


def complex_step(program: Program) -> None:
    value = program.pick(lambda t: t.is_complex())
    if value is None:
        value = program.pick(lambda t: t.dtype is torch.float32 and t.dim() > 0 and t.shape[-1] == 2)
        if value is not None:
            program.add("as complex", [value], lambda x: torch.view_as_complex(x.contiguous()), True)
        return
    choices: dict[str, Callable[..., Any]] = {
        "conj": torch.conj, "square": lambda z: z * z, "abs": torch.abs, "real": torch.real, "imag": torch.imag,
        "by conj": lambda z: z * z.conj(), "pairs": torch.view_as_real, "imag of conj": lambda z: z.conj().imag,
    }  # fmt: skip
    name = program.random.choice([*choices])
    program.add(name, [value], choices[name], name in ("conj", "real", "imag", "pairs", "imag of conj"))


def norm(program: Program) -> None:
    value = program.pick(lambda t: _rows(t) and bool(t.isfinite().all()) and bool((t.abs() < 1e4).all()))
    if value is None:
        return
    width, dtype = value.example.shape[-1], value.example.dtype
    weight = program.fresh((width,), dtype)

    def rms(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return w * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)).to(x.dtype)

    def layer(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return centred / torch.sqrt(centred.pow(2).mean(-1, keepdim=True) + 1e-3) * w

    choices: dict[str, Callable[..., Any]] = {
        "rms_norm": lambda x, w: F.rms_norm(x, (width,), w, 1e-5), "spelled rms_norm": rms, "spelled layer_norm": layer,
        "layer_norm": lambda x, w: F.layer_norm(x, (width,), w, None, 1e-3), "affine": lambda x, w: x * w + w,
    }  # fmt: skip
    name = program.random.choice([*choices])
    program.add(name, [value, weight], choices[name])


def product(program: Program) -> None:
    value = program.pick(lambda t: _rows(t) and bool(t.isfinite().all()) and bool((t.abs() < 1e3).all()))
    if value is None:
        return
    wide = program.random.choice((1, 3, 8, 17))
    weight = program.fresh((wide, value.example.shape[-1]), value.example.dtype)
    if program.random.random() < 0.6:
        bias = program.fresh(program.random.choice(((wide,), (1,), (wide,))), value.example.dtype)
        program.add("linear", [value, weight, bias], lambda x, w, b: F.linear(x, w, b))
    else:
        program.add("matmul", [value, weight], lambda x, w: x @ w.t())


def rope(program: Program) -> None:
    dtype = program.random.choice((torch.float32, torch.bfloat16))
    length, width = program.random.choice((1, 3)), program.random.choice((4, 8))
    x = program.fresh((2, 2, length, width), dtype)
    cos, sin = program.fresh((1, 1, length, width), dtype), program.fresh((1, 1, length, width), dtype)

    def halves(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        half = x.shape[-1] // 2
        return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin

    def pairs(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        return x * cos + torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2) * sin

    name, function = program.random.choice((("rope", halves), ("interleaved rope", pairs)))
    program.add(name, [x, cos, sin], function)


def attention(program: Program) -> None:
    dtype = program.random.choice((torch.float32, torch.float32, torch.bfloat16))
    queries, keys = program.random.choice((1, 2, 5)), program.random.choice((2, 5, 70))
    shapes = [(2, 2, n, 8) for n in (queries, keys, keys)]
    moved = program.random.random() < 0.3
    q, k, v = (program.fresh((s[0], s[2], s[1], s[3]) if moved else s, dtype) for s in shapes)
    mask = program.fresh((2, 1, queries, keys), torch.bool)
    whole = program.random.random() < 0.4
    if whole:
        program.inputs[mask.name][0, :, 0] = True
    scale = program.random.choice((1.0, 0.5, 0.125))

    def heads(x: torch.Tensor) -> torch.Tensor:
        return x.transpose(1, 2) if moved else x

    def scores(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return heads(q) @ heads(k).transpose(-1, -2) * scale

    ways: dict[str, Callable[..., Any]] = {
        "filled": lambda q, k, v, m: F.softmax(scores(q, k).masked_fill(m, -INF), -1) @ heads(v),
        "where": lambda q, k, v, m: F.softmax(torch.where(m, -INF, scores(q, k)), -1) @ heads(v),
        "added": lambda q, k, v, m: F.softmax(
            scores(q, k) + torch.zeros(m.shape, dtype=q.dtype).masked_fill(m, -INF), -1
        ) @ heads(v),
        "unmasked": lambda q, k, v, m: F.softmax(scores(q, k), -1) @ heads(v),
        "sdpa": lambda q, k, v, m: F.scaled_dot_product_attention(heads(q), heads(k), heads(v), scale=scale),
        "sdpa masked": lambda q, k, v, m: F.scaled_dot_product_attention(
            heads(q), heads(k), heads(v), (~m) | m.logical_not().any(-1, keepdim=True).logical_not(), scale=scale
        ),
    }  # fmt: skip
    name = program.random.choice([*ways])
    program.add(f"attention, {name}, x {scale}", [q, k, v, mask], ways[name])


STEPS = (
    pointwise, pointwise, pointwise, scalar, scalar, binary, binary, compare, cast, cast, reduce, reduce, view, view,
    complex_step, norm, product, rope, attention,
)  # fmt: skip


# --- a trial


def trial(program: Program, target: str) -> str | None:
    """What is wrong with the captured program on a target, over three calls, or None."""
    config = FusionConfig(profile="always", target=target, enable_cache=False)
    fast = capture(program, config)
    arguments = list(program.inputs.values())
    with torch.no_grad():
        wanted = program(*(copy.deepcopy(tensor) for tensor in arguments))
        precise = _in_float64(program, arguments)
        for number in range(3):
            try:
                got = fast(*(copy.deepcopy(tensor) for tensor in arguments))
            except CaptureError:
                return None
            except Exception as error:
                return f"call {number}: {type(error).__name__}: {error}"
            roundings = {value.name: value.rounding for value in program.pool}
            for name, ours, theirs, exact in zip(program.returned, got, wanted, precise, strict=True):
                found = difference(ours, theirs, exact, roundings[name])
                if found is not None:
                    return f"call {number}: {name} {found}"
    return None


def _in_float64(program: Program, arguments: list[torch.Tensor]) -> list[torch.Tensor | None]:
    """The results with float32 arguments in float64; None for what is no float then, or of another shape."""
    if not all(tensor.dtype in (torch.float32, torch.float64) for tensor in arguments):
        return [None] * len(program.returned)
    try:
        return list(program(*(tensor.double() for tensor in arguments)))
    except RuntimeError:
        return [None] * len(program.returned)


def difference(
    ours: torch.Tensor, theirs: torch.Tensor, exact: torch.Tensor | None, rounding: float = 0.0
) -> str | None:
    """What first differs between a result and eager's, or None; `rounding` is that of the coarsest dtype behind it."""
    if (ours.shape, ours.dtype) != (theirs.shape, theirs.dtype):
        return f"is {ours.dtype} {tuple(ours.shape)} instead of {theirs.dtype} {tuple(theirs.shape)}"
    if ours.stride() != theirs.stride():
        return f"has strides {ours.stride()} instead of {theirs.stride()}"
    left, right = (t.resolve_conj().resolve_neg() for t in (ours, theirs))
    if left.is_complex():
        left, right = torch.view_as_real(left), torch.view_as_real(right)
    if not left.is_floating_point():
        return None if torch.equal(left, right) else f"is {_few(left)} instead of {_few(right)}"
    a, b = left.double(), right.double()
    if not torch.equal(a.isnan(), b.isnan()) or not torch.equal(a[a.isinf() | b.isinf()], b[a.isinf() | b.isinf()]):
        return f"is {_few(left)} instead of {_few(right)}"
    plain = a.isfinite()
    tolerance = {torch.float64: 1e-9, torch.float32: 2e-5}.get(theirs.dtype, 8 * torch.finfo(theirs.dtype).eps)
    tolerance = max(tolerance, (8 if rounding > 1e-6 else 160) * rounding)
    allowed = tolerance * (1 + b[plain].abs())
    if exact is not None and exact.is_floating_point() and exact.shape == theirs.shape:
        allowed = allowed + 20 * (b - exact.double())[plain].abs().nan_to_num(INF, INF)
    off = (a[plain] - b[plain]).abs() > allowed
    return f"is {_few(left[plain][off])} instead of {_few(right[plain][off])}" if bool(off.any()) else None


def _few(tensor: torch.Tensor) -> str:
    return str(tensor.flatten()[:6].tolist())
