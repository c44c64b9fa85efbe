"""The simplifier of generated Triton source: what goes, what stays, and that every access stays the same."""

import ast
import re
import types

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from graph_capture.codegen.ninetoothed.triton_source.simplify import simplify

KERNEL = """
import triton
import triton.language

@triton.jit
def kernel(ninetoothed_x_pointer, ninetoothed_x_size_0, ninetoothed_x_stride_0):
    ninetoothed_pid = triton.language.program_id(0)
    ninetoothed_x_index_0 = ninetoothed_pid // 4
    ninetoothed_x_index_1 = ninetoothed_pid % 4
    ninetoothed_x_pointers = ninetoothed_x_pointer
    loaded = triton.language.load({pointer}, mask={mask}, other=None)

def launch_kernel(x):
    kernel[lambda meta: ({grid},)](x, x.size(0), x.stride(0), num_warps=4)
"""
RANGE = "triton.language.arange(0, 16)[None, ::]"
PID = "ninetoothed_pid"
SIZE, STRIDE = "ninetoothed_x_size_0", "ninetoothed_x_stride_0"
ROW, COLUMN = "ninetoothed_x_index_0", "ninetoothed_x_index_1"


def simplified(source):
    tree = ast.parse(source)
    simplify(tree)
    return ast.unparse(tree)


def kernel(mask, pointer=f"ninetoothed_x_pointers + ({ROW} + {RANGE})", grid="x.size(1)"):
    return KERNEL.format(pointer=pointer, mask=mask, grid=grid)


def mask_of(mask, grid="x.size(1)"):
    """What is left of a mask, with every name written out."""
    text = simplified(kernel(mask, grid=grid))
    (line,) = re.findall(r"    loaded = (.*)", text)
    for name, meaning in reversed(re.findall(r"(shared_\d+) = (.*)", text)):
        line = re.sub(rf"\b{name}\b", f"({meaning})", line)
    call = ast.parse(line, mode="eval").body
    return {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}.get("mask")


def written_out(condition):
    pid = "triton.language.program_id(0)"
    text = condition.replace(ROW, f"({pid} // 4)").replace(COLUMN, f"({pid} % 4)")
    return ast.unparse(ast.parse(f"True & {text}"))


@pytest.mark.parametrize(
    "always",
    [
        f"({RANGE} < 16)",
        f"({RANGE} >= 0)",
        f"({COLUMN} < 4)",
        f"({COLUMN} * 16 + {RANGE} < 64)",
        f"({ROW} >= 0)",
        f"({ROW} * {STRIDE} >= 0)",
        f"({ROW} % {SIZE} < {SIZE})",
        f"({SIZE} - 1 + 1 >= 0)",
        f"({SIZE} - ({SIZE} - 1) >= 1)",
        f"(0 < ({SIZE} - 1) // {SIZE} + 1)",
        f"(0 * {ROW} < 1)",
        f"({ROW} % 1 < 1)",
        "True",
    ],
)
def test_conditions_that_always_hold_go(always):
    assert mask_of(f"True & {always}") is None
    assert mask_of(f"True & {always} & ({ROW} < {SIZE})") == written_out(f"({ROW} < {SIZE})")


@pytest.mark.parametrize(
    ("grid", "always"),
    [
        ("12", f"({PID} < 12)"),
        ("12", f"({ROW} < 3)"),
        ("12", f"({ROW} * 16 + {RANGE} < 48)"),
        ("12", f"({PID} // 6 % 2 < 2)"),
        ("x.size(0) - 1 + 1", f"({PID} < {SIZE})"),
        ("x.size(0) * 4", f"({ROW} < {SIZE})"),
        ("4 * (x.size(0) * x.stride(0))", f"({ROW} // {STRIDE} < {SIZE})"),
        ("4 * (x.size(0) * x.stride(0))", f"({ROW} // {SIZE} < {STRIDE})"),
        ("x.size(0) * 4", f"({PID} // {SIZE} < 4)"),
        ("x.size(0) * 4", f"({PID} // {SIZE} * 16 + {RANGE} < 64)"),
        ("(x.size(0) - 7 - 1 + 8 - 1) // 8 + 1", f"({PID} < ({SIZE} - 1) // 8 + 1)"),
        ("x.size(0) * 4", f"({PID} % ({SIZE} * {STRIDE}) // {STRIDE} < {SIZE})"),
    ],
)
def test_conditions_that_the_grid_fulfils_go(grid, always):
    assert mask_of(f"True & {always}", grid) is None


@pytest.mark.parametrize(
    ("grid", "needed"),
    [
        ("13", f"({ROW} < 3)"),
        ("12", f"({PID} < 11)"),
        ("x.size(0) * 4", f"({PID} < {SIZE})"),
        ("x.size(0) * 5", f"({ROW} < {SIZE})"),
        ("x.size(0)", f"({ROW} < {STRIDE})"),
        ("x.size(0) * x.size(0)", f"({PID} // {SIZE} < {STRIDE})"),
        ("x.size(0) + 4", f"({PID} < {SIZE})"),
        ("x.numel()", f"({PID} < {SIZE})"),
        ("x.size(0), 1", f"({PID} < {SIZE})"),
    ],
)
def test_conditions_that_the_grid_does_not_fulfil_stay(grid, needed):
    pid = "triton.language.program_id(0)"
    assert mask_of(f"True & {needed}", grid) == written_out(needed.replace(PID, pid))


def test_arguments_that_nothing_looks_at_go():
    text = simplified(kernel("True", grid="x.size(0)"))
    assert "def kernel(ninetoothed_x_pointer):" in text
    assert "kernel[lambda meta: (x.size(0),)](x, num_warps=4)" in text
    text = simplified(kernel(f"({RANGE} < {SIZE})", grid="x.size(0)"))
    assert "def kernel(ninetoothed_x_pointer, ninetoothed_x_size_0):" in text
    assert "](x, x.size(0), num_warps=4)" in text


@pytest.mark.parametrize(
    "needed",
    [
        f"({RANGE} < 15)",
        f"({COLUMN} < 3)",
        f"({COLUMN} * 16 + {RANGE} < 63)",
        f"({ROW} < {SIZE})",
        f"({ROW} % 5 < {SIZE})",
        "(x >= 0)",
        f"({SIZE} - 1 >= 0)",
        "(unknown >= 0)",
        f"({ROW} - 1 >= 0)",
        f"(({ROW} - 1) // 2 >= 0)",
    ],
)
def test_conditions_that_may_fail_stay(needed):
    assert mask_of(f"True & {needed} & {needed}") == written_out(needed)


def test_names_that_change_are_not_known():
    source = kernel("(slot >= 0)").replace("    loaded", "    slot = 1\n    slot = slot - 2\n    loaded")
    assert "slot >= 0" in simplified(source)


def test_what_is_said_twice_gets_a_name_in_its_block():
    source = kernel("True").replace(
        "    loaded =",
        f"""
    for step in range({SIZE}):
        if step > 3:
            a = triton.language.load(ninetoothed_x_pointers + step * 16 + {RANGE})
            triton.language.store(ninetoothed_x_pointers + step * 16 + {RANGE}, a * a)
        else:
            triton.language.store(ninetoothed_x_pointers + step * 16 + {RANGE}, 0.0)
    loaded =""",
    )
    text = simplified(source)
    names = re.findall(r"shared_\d+ = ninetoothed_x_pointer \+ step \* 16 \+ .*", text)
    assert len(names) == 2  # one for each branch
    assert "a * a" in text


# --- every access stays the same


class Kernel:
    """Triton's JITFunction, played: each program of a grid in turn, at most forty of them."""

    def __init__(self, function):
        self.function, self.program = function, 0

    def __getitem__(self, grid):
        def launch(x, *args, **options):
            for self.program in range(min(40, grid({})[0])):
                self.function(100000, *args)

        return launch


def accesses(source, size, stride):
    """Where the programs of a kernel read, and the shapes of what they read, with Triton's language played by numpy."""
    seen = []

    def load(pointer, mask=True, other=None):
        pointer, mask = numpy.broadcast_arrays(pointer, mask)
        seen.append((pointer.shape, pointer[mask].tolist()))
        return pointer

    language = types.SimpleNamespace(program_id=lambda axis: scope["kernel"].program, arange=numpy.arange, load=load)
    scope = {"triton": types.SimpleNamespace(language=language, jit=Kernel)}
    exec(source.replace("import triton.language\n", "").replace("import triton\n", ""), scope)
    scope["launch_kernel"](types.SimpleNamespace(size=(size, 3).__getitem__, stride=(stride,).__getitem__))
    return seen


def expressions(leaves):
    binary = st.tuples(leaves, st.sampled_from("+-*"), leaves).map("({0[0]} {0[1]} {0[2]})".format)
    divided = st.tuples(
        leaves,
        st.sampled_from(["//", "%"]),
        st.sampled_from(["1", "3", SIZE, f"({SIZE} * 4)", f"(({SIZE} - 1) // 3 + 1)"]),
    )
    return binary | divided.map("({0[0]} {0[1]} {0[2]})".format)


def sums(length):
    """Of indices and of ranges over two dimensions, the first `length` long, as offsets and conditions are."""
    ranges = st.sampled_from([f"triton.language.arange(0, {length})[:, None]", "triton.language.arange(0, 1)[None, :]"])
    parts = st.tuples(scalars, scalars, ranges, scalars, ranges)
    return parts.map("{0[0]} + ({0[1]} + {0[2]}) * {0[3]} + {0[4]}".format)


def programs(length):
    compared = st.tuples(sums(length) | scalars, st.sampled_from(["<", ">="]), scalars)
    offsets = sums(length).map(f"{{}} + triton.language.arange(0, {length})[:, None]".format)
    return st.tuples(offsets, st.lists(compared.map("({0[0]} {0[1]} {0[2]})".format), max_size=4))


scalars = st.recursive(st.sampled_from([PID, ROW, COLUMN, SIZE, STRIDE, "0", "1", "2"]), expressions, max_leaves=6)


sizes = ["x.size(0)", "x.size(1)", "x.stride(0)", "(x.size(0) - 2 - 1 + 3 - 1) // 3 + 1", "4", "12"]
grids = st.lists(st.sampled_from(sizes), min_size=1, max_size=3).map(" * ".join)


@given(programs(1) | programs(4), grids, st.integers(1, 9), st.integers(0, 5))
def test_every_access_stays_the_same(program, grid, size, stride):
    offset, mask = program
    source = kernel(" & ".join(["True", *mask]), f"ninetoothed_x_pointers + ({offset})", grid)
    assert accesses(simplified(source), size, stride) == accesses(source, size, stride)
