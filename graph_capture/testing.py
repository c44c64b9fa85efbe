"""Contracts: what a fused graph must hold, as assertions that say why it does not."""

from __future__ import annotations

import fnmatch
from collections import Counter
from typing import Any

import torch

from graph_capture.ir.interpreter import interpret
from graph_capture.ir.numerics import in_float64
from graph_capture.ir.ops import GUARD, Kind, op
from graph_capture.passes import DEFAULT, pass_names
from graph_capture.passes.receipts import module_of
from graph_capture.runtime.account.verify import compared
from graph_capture.runtime.fused import FusedGraph


class ContractError(AssertionError):
    """A fused graph does not keep a contract.

    Attributes:
        graph_capture_receipts: the places that rules have refused, and why; the pytest plugin prints them.
    """

    def __init__(self, message: str, receipts: str) -> None:
        super().__init__(f"{message}\n{receipts}" if receipts else message)
        self.graph_capture_receipts = receipts


def assert_fused(fused: FusedGraph, **counts: int) -> None:
    """Check how many regions of each kind replay as one kernel: ``assert_fused(fused, swiglu=32)``.

    With ``FusionConfig(profile="always")`` that is what was found; else what measured faster is counted.

    Raises:
        ContractError: a count differs. The message has what was refused, where, and why.
        ValueError: no rule makes such a region.
    """
    known = {*pass_names(DEFAULT if fused.config.patterns is None else fused.config.patterns)}
    known |= {region.kind for region in fused.regions}
    for name in counts:
        if name not in known:
            raise ValueError(f"no rule makes regions {name!r}; there are {', '.join(sorted(known))}")
    used = Counter(region.kind for region in fused.regions if region.decision)
    off = [name for name, count in counts.items() if used[name] != count]
    if off:
        text = "; ".join(f"{name}: {used[name]} kernels, not {counts[name]}" for name in off)
        raise ContractError(text, near_misses(fused, *off))


def near_misses(fused: FusedGraph, *rules: str) -> str:
    """What these rules have looked at and not taken, or what was not used of it, with places and reasons."""
    lines = []
    for receipt in fused.receipts:
        if receipt.rule in rules and not receipt.spelling:
            lines.append(f"{receipt.rule}: {receipt.matches} of {receipt.candidates} candidates matched")
            lines += [
                f"    {refusal.where or 'top level'} ({', '.join(refusal.values[-1:])}): {refusal.reason}"
                for refusal in receipt.refused
            ]
    lines += [
        f"{region.name} ({region.where or 'top level'}): not used: {region.decision.reason}"
        for region in fused.regions
        if region.kind in rules and not region.decision
    ]
    return "\n".join(lines)


def launches(fused: FusedGraph) -> list[tuple[str, str]]:
    """What a replay runs besides views and checks of values: module path and name of each kernel or op, in order."""
    found = []
    for step in fused.steps:
        node = step.node
        if step.own or (op(node.op_type).kind is not Kind.VIEW and not node.op_type.startswith(GUARD)):
            found.append((module_of(node.recorded[-1]), step.label or node.op_type))
    return found


def assert_launches(fused: FusedGraph, at_most: int, per: str = "") -> None:
    """Check how many kernels and ops a replay runs, in all or in each module that `per` matches (``layers.*``).

    A kernel that spans modules counts where its last op is.

    Raises:
        ContractError: there are more; the message lists them.
        ValueError: no module matches.
    """
    groups: dict[str, list[str]] = {}
    depth = per.count(".") + 1
    for where, name in launches(fused):
        parts = where.split(".") if where else []
        starts = range(max(0, len(parts) - depth) + 1) if per else ()
        windows = (
            start + depth for start in starts if fnmatch.fnmatchcase(".".join(parts[start : start + depth]), per)
        )
        end = next(windows, None) if per else 0
        if end is not None:
            groups.setdefault(".".join(parts[:end]), []).append(name)
    if per and not groups:
        raise ValueError(f"no kernel or op lies in a module {per!r}")
    for where, names in groups.items():
        if len(names) > at_most:
            text = ", ".join(f"{count} x {name}" for name, count in Counter(names).most_common())
            kinds = {receipt.rule for receipt in fused.receipts if receipt.refused}
            raise ContractError(
                f"{where or 'the graph'}: {len(names)} launches, at most {at_most} are allowed: {text}",
                near_misses(fused, *sorted(kinds)),
            )


def assert_close_to_float64(fused: FusedGraph, *args: Any, factor: float = 2.0, **kwargs: Any) -> None:
    """Check that a replay is about as close to float64 as the recorded ops are; what both write is undone.

    Args:
        fused: the graph.
        args, kwargs: a call of the recorded signature.
        factor: how many times the recorded ops' error is allowed; 8 roundings of the result's dtype always are.

    Raises:
        ContractError: it is not; the message has each kernel's own error, worst first.
        SignatureMismatchError: the call is another one than was recorded.
    """
    recorded = fused.recorded
    call = recorded.bind(args, kwargs)
    tensors = [*call.tensors, *recorded.captured.values()]
    results: dict[str, list[torch.Tensor]] = {"float64": in_float64(recorded.subgraph, tensors)}
    for name, execute in (("recorded", None), ("fused", fused.execute)):
        with recorded.undone(tensors):
            dynamic, static = call.tensors, recorded.static
            made = execute(dynamic, static) if execute else interpret(recorded.subgraph, tensors)
            results[name] = [tensor.clone() for tensor in made]
    for output, *three in zip(recorded.subgraph.output_names, *results.values(), strict=True):
        exact, eager, ours = three
        before, after, _ = compared(ours, eager, exact)
        unit = torch.finfo(ours.dtype).eps if ours.dtype.is_floating_point else 0.0
        if after > max(factor * before, 8 * unit):
            with recorded.undone(tensors):
                kernels = str(fused.verify(*args, **kwargs))
            raise ContractError(
                f"{output} is {after:.2e} from float64 (relative), the recorded ops are {before:.2e}", kernels
            )
