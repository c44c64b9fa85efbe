"""An `AttentionSpec` as C: a unit of work is one key head, or a *split* of its keys where there are few heads.

The softmax runs along (Milakov and Gimelshein, 2018), a block of keys at a time, in float32. A block that the mask
leaves out for every row is passed over before anything of it is read. A split has every so-manieth block; a second
function adds the splits up (Flash-Decoding: Dao et al., 2023).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from graph_capture.codegen.c import printing as c_print
from graph_capture.codegen.c.host import Layout, Place, place
from graph_capture.codegen.spec.attention import AttentionSpec
from graph_capture.errors import FusionError

BLOCK = 64  # keys at a time
UNITS = 8  # that are wanted: the threads of a small machine
SPLIT = 1024  # the fewest keys of a split


def layout(spec: AttentionSpec, tensors: Sequence[torch.Tensor], thread_work: int) -> tuple[Layout, ...]:
    """How a call on these tensors (inputs, then the output) runs.

    Raises:
        FusionError: they do not fit the kernel, or the elements of a head lie apart.
    """
    views = spec.operands(tensors)
    numbers: list[int] = []
    for index, view in enumerate(views):
        steps = [step if size > 1 else 0 for size, step in zip(view.shape, view.stride(), strict=True)]
        if index == 3 and len(views) == 5:
            numbers += steps
        elif view.shape[3] > 1 and steps[3] != 1:
            raise FusionError("the elements of a head lie apart")
        else:
            numbers += steps[:3]
    count, units = splits(spec), spec.batch * spec.heads
    work = spec.rows * (spec.width + spec.out_width) * -(-spec.length // count)
    operands = tuple(place(index, view, tensors[index]) for index, view in enumerate(views))
    grain = max(1, thread_work // max(1, work))
    if count == 1:
        return (Layout(tuple(numbers), units, grain, operands),)
    scratch = units * count * spec.rows * (spec.out_width + 2)
    parts, out = Place(len(tensors)), operands[-1]
    return (
        Layout(tuple(numbers), units * count, grain, (*operands[:-1], parts), scratch=scratch),
        Layout(tuple(numbers[-3:]), units, units, (parts, out), "_sum"),
    )


def splits(spec: AttentionSpec) -> int:
    """How many parts the keys of a head are divided into."""
    return max(1, min(UNITS // (spec.batch * spec.heads), spec.length // SPLIT))


def source(spec: AttentionSpec, name: str) -> str:
    """The function's text, and that of the function which adds up splits."""
    return _AttentionPrinter(spec).attend(name) + (_AttentionPrinter(spec).combine(name) if splits(spec) > 1 else "")


class _AttentionPrinter:
    def __init__(self, spec: AttentionSpec) -> None:
        self.spec, self.splits = spec, splits(spec)
        self.kind = c_print.MEMORY[spec.dtype]
        self.load = f"lanes_{c_print.HALVES.get(spec.dtype, 'float')}"

    def attend(self, name: str) -> str:
        """The function over the units."""
        spec, rows = self.spec, self.spec.rows
        masked = len(spec.inputs) > 3
        blocks = -(-spec.length // BLOCK)
        body = [
            f"const int64_t part = unit % {self.splits}, head = unit / {self.splits} % {spec.heads};",
            f"const int64_t batch = unit / {self.splits * spec.heads};",
            *(
                f"const {self.kind} *const {operand} = (const {self.kind} *)operands[{index}]"
                f" + batch * numbers[{3 * index}] + head * numbers[{3 * index + 1}];"
                for index, operand in enumerate(("query", "key", "value"))
            ),
            f"float q[{rows}][{_padded(spec.width)}] __attribute__((aligned(64)));",
            f"float mean[{rows}][{_padded(spec.out_width)}] __attribute__((aligned(64)));",
            f"float weights[{rows}][{BLOCK}] __attribute__((aligned(64)));",
            f"float top[{rows}], total[{rows}];",
            "memset(q, 0, sizeof q);",
            "memset(mean, 0, sizeof mean);",
            f"for (int64_t r = 0; r < {rows}; r++) {{",
            "    top[r] = -INFINITY, total[r] = 0;",
            f"    for (int64_t e = 0; e < {spec.width}; e++)",
            f"        q[r][e] = {c_print.load('query', 'r * numbers[2] + e', spec.dtype)};",
            "}",
            f"for (int64_t block = part; block < {blocks}; block += {self.splits}) {{",
            f"    const int64_t first = block * {BLOCK};",
            f"    const int64_t count = first + {BLOCK} < {spec.length} ? {BLOCK} : {spec.length} - first;",
            *(f"    {line}" for line in (self._mask() if masked else [])),
            f"    const {self.kind} *const keys = key + first * numbers[5];",
            f"    const {self.kind} *const values = value + first * numbers[8];",
            *(f"    {line}" for line in (*self._scores(), *self._softmax(masked), *self._values())),
            "}",
            *self._result(),
        ]
        return "\n".join(
            [
                f"void {name}(void *const *operands, const int64_t *numbers, int64_t begin, int64_t end) {{",
                "    for (int64_t unit = begin; unit < end; unit++) {",
                *(f"        {line}" for line in body),
                "    }",
                "}",
                "",
            ]
        )

    def _mask(self) -> list[str]:
        """Where the block's mask is, and whether it leaves the whole block out."""
        spec = self.spec
        dtype, rows = spec.inputs[3].dtype, spec.rows if spec.mask[2] else 1
        kept = c_print.load("mask", "r * numbers[11] + j * numbers[12]", dtype)
        kept = kept if dtype is torch.bool else f"({kept} > -INFINITY)"
        kind = c_print.MEMORY[dtype]
        return [
            f"const {kind} *const mask = (const {kind} *)operands[3] + batch * numbers[9] + head * numbers[10]"
            " + first * numbers[12];",
            "int32_t any = 0;",
            f"for (int64_t r = 0; r < {rows}; r++)",
            f"    for (int64_t j = 0; j < count; j++) any |= {kept};",
            "if (!any) continue;",
        ]

    def _scores(self) -> list[str]:
        """The products of keys with the queries: as many keys as there are lanes, and then all their sums."""
        spec, rows = self.spec, range(self.spec.rows)
        key = [f"const {self.kind} *const from = keys + j * numbers[5];", *(f"lanes a{r} = {{0}};" for r in rows)]
        key += self._along(spec.width, [f"a{r} += from_lanes * lanes_float(&q[{r}][e]);" for r in rows])
        key += [f"products[{r}][j - group] = a{r};" for r in rows]
        return [
            "for (int64_t group = 0; group < count; group += LANES) {",
            f"    lanes products[{spec.rows}][LANES];",
            "    const int64_t end = group + LANES < count ? group + LANES : count;",
            "    for (int64_t j = group; j < end; j++) {",
            *(f"        {line}" for line in key),
            "    }",
            "    for (int64_t j = end; j < group + LANES; j++)",
            f"        for (int64_t r = 0; r < {spec.rows}; r++) products[r][j - group] = (lanes){{0}};",
            f"    for (int64_t r = 0; r < {spec.rows}; r++) {{",
            "        const lanes sums = lanes_sums(products[r]);",
            "        memcpy(&weights[r][group], &sums, sizeof sums);",
            "    }",
            "}",
        ]

    def _along(self, width: int, body: Sequence[str]) -> list[str]:
        """A loop over the elements of a head in memory, some lanes at a time; `body` reads them as `from_lanes`."""
        return [
            "int64_t e = 0;",
            f"for (; e + LANES <= {width}; e += LANES) {{",
            f"    const lanes from_lanes = {self.load}(from + e);",
            *(f"    {line}" for line in body),
            "}",
            f"if (e < {width}) {{",
            f"    {self.kind} tail[LANES] = {{0}};",
            f"    memcpy(tail, from + e, ({width} - e) * sizeof *tail);",
            f"    const lanes from_lanes = {self.load}(tail);",
            *(f"    {line}" for line in body),
            "}",
        ]

    def _softmax(self, masked: bool) -> list[str]:
        """Scores become weights, and what was summed up before is brought to their scale."""
        spec = self.spec
        score = f"weights[r][j] * {c_print.literal(spec.scale, torch.float32)}"
        if spec.cap is not None:
            cap = c_print.literal(spec.cap, torch.float32)
            score = f"{cap} * tanh_float({score} / {cap})"
        if masked:
            dtype = spec.inputs[3].dtype
            place = f"{'r * numbers[11] + ' if spec.mask[2] else ''}j * numbers[12]"
            value = c_print.load("mask", place, dtype)
            score = f"{value} ? {score} : -INFINITY" if dtype is torch.bool else f"{score} + {value}"
        return [
            f"for (int64_t r = 0; r < {spec.rows}; r++) {{",
            "    float highest = top[r];",
            "    #pragma omp simd reduction(max:highest)",
            "    for (int64_t j = 0; j < count; j++) {",
            f"        const float score = {score};",
            "        weights[r][j] = score;",
            "        highest = score > highest ? score : highest;",  # false for NaN
            "    }",
            "    const float base = highest == -INFINITY ? 0 : highest;",  # nothing is allowed yet
            "    const float decay = exp_float(top[r] - base);",
            "    float sum = 0;",
            "    #pragma omp simd reduction(+:sum)",
            "    for (int64_t j = 0; j < count; j++) {",
            "        const float weight = exp_float(weights[r][j] - base);",
            "        weights[r][j] = weight;",
            "        sum += weight;",
            "    }",
            "    top[r] = highest;",
            "    total[r] = total[r] * decay + sum;",
            f"    for (int64_t e = 0; e < {_padded(spec.out_width)}; e++) mean[r][e] *= decay;",
            "}",
        ]

    def _values(self) -> list[str]:
        """The values of the block, weighted and added: some lanes of all rows at a time."""
        spec, rows = self.spec, range(self.spec.rows)
        whole, rest = "values + j * numbers[8] + e", spec.out_width

        def sums(load: Sequence[str]) -> list[str]:
            return [
                *(f"lanes a{r} = lanes_float(&mean[{r}][e]);" for r in rows),
                "for (int64_t j = 0; j < count; j++) {",
                *(f"    {line}" for line in load),
                *(f"    a{r} += from_lanes * weights[{r}][j];" for r in rows),
                "}",
                *(f"memcpy(&mean[{r}][e], &a{r}, sizeof a{r});" for r in rows),
            ]

        tail = [
            f"{self.kind} tail[LANES] = {{0}};",
            f"memcpy(tail, {whole}, ({rest} - e) * sizeof *tail);",
            f"const lanes from_lanes = {self.load}(tail);",
        ]
        return [
            "int64_t e = 0;",
            f"for (; e + LANES <= {rest}; e += LANES) {{",
            *(f"    {line}" for line in sums([f"const lanes from_lanes = {self.load}({whole});"])),
            "}",
            f"if (e < {rest}) {{",
            *(f"    {line}" for line in sums(tail)),
            "}",
        ]

    def _result(self) -> list[str]:
        spec = self.spec
        if self.splits > 1:
            size = spec.out_width + 2
            return [
                f"float *const to = (float *)operands[{len(spec.inputs)}] + unit * {spec.rows * size};",
                f"for (int64_t r = 0; r < {spec.rows}; r++) {{",
                f"    memcpy(to + r * {size}, mean[r], {spec.out_width} * sizeof(float));",
                f"    to[r * {size} + {spec.out_width}] = top[r], to[r * {size} + {spec.out_width + 1}] = total[r];",
                "}",
            ]
        return self._stored(len(spec.inputs), 3 * len(spec.inputs) + (1 if spec.mask else 0), "batch", "head")

    def _stored(self, operand: int, number: int, batch: str, head: str) -> list[str]:
        spec = self.spec
        result = "mean[r][e] / total[r]" if spec.strict else "total[r] == 0 ? 0 : mean[r][e] / total[r]"
        store = c_print.store("to", "e", spec.dtype, result)
        return [
            f"for (int64_t r = 0; r < {spec.rows}; r++) {{",
            f"    {self.kind} *const to = ({self.kind} *)operands[{operand}] + {batch} * numbers[{number}]"
            f" + {head} * numbers[{number + 1}] + r * numbers[{number + 2}];",
            f"    for (int64_t e = 0; e < {spec.out_width}; e++) {store}",
            "}",
        ]

    def combine(self, name: str) -> str:
        """The function that adds up the splits of a head."""
        spec, width, size = self.spec, self.spec.out_width, self.spec.out_width + 2
        each = spec.rows * size
        body = [
            f"const float *const parts = (const float *)operands[0] + unit * {self.splits * each};",
            f"float mean[{spec.rows}][{width}], total[{spec.rows}];",
            f"for (int64_t r = 0; r < {spec.rows}; r++) {{",
            "    float highest = -INFINITY;",
            f"    for (int64_t part = 0; part < {self.splits}; part++) {{",
            f"        const float top = parts[part * {each} + r * {size} + {width}];",
            "        highest = top > highest ? top : highest;",
            "    }",
            "    total[r] = 0;",
            f"    for (int64_t e = 0; e < {width}; e++) mean[r][e] = 0;",
            f"    for (int64_t part = 0; part < {self.splits}; part++) {{",
            f"        const float *const from = parts + part * {each} + r * {size};",
            f"        const float share = exp_float(from[{width}] - (highest == -INFINITY ? 0 : highest));",
            f"        total[r] += share * from[{width + 1}];",
            f"        for (int64_t e = 0; e < {width}; e++) mean[r][e] += share * from[e];",
            "    }",
            "}",
            *self._stored(1, 0, f"unit / {spec.heads}", f"unit % {spec.heads}"),
        ]
        return "\n".join(
            [
                f"\nvoid {name}_sum(void *const *operands, const int64_t *numbers, int64_t begin, int64_t end) {{",
                "    for (int64_t unit = begin; unit < end; unit++) {",
                *(f"        {line}" for line in body),
                "    }",
                "}",
                "",
            ]
        )


def _padded(width: int) -> int:
    """A width as whole vectors of any machine."""
    return -(-width // 16) * 16
