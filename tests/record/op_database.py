"""PyTorch's op database through `capture`: inputs that are views, conjugated, negated, strided; calls under autocast.

    python -m tests.record.op_database [--samples N] [--part K/N] [NAME ...]

Each call is compared bit for bit with the op as it is: the recording's own result, a replay, a replay on other values.
"""

import argparse
import collections
import contextlib
import itertools
import warnings

import torch
from torch.utils import _pytree as pytree

from graph_capture import CaptureError, capture
from tests.capturing import UNFUSED
from tests.test_opinfo import SKIPPED, UNINITIALISED, assert_same_bits, copied, invocations, other_values

INFOS = [info for info in invocations.op_db if info.formatted_name not in SKIPPED and info.name not in UNINITIALISED]
COMPLEX, FLOAT, BFLOAT, INTEGER = torch.complex64, torch.float32, torch.bfloat16, torch.int64


def viewed(tensor):
    """The same values, in the middle of a larger memory."""
    memory = torch.cat([tensor.new_zeros(3), tensor.contiguous().reshape(-1), tensor.new_zeros(2)])
    return memory[3 : 3 + tensor.numel()].view(tensor.shape)


def strided(tensor):
    """The same values, every second element of a memory with the dimensions turned round."""
    turned = tensor.permute(tuple(reversed(range(tensor.dim()))))
    memory = tensor.new_zeros((*turned.shape, 2))
    memory[..., 0] = turned
    return memory[..., 0].permute(tuple(reversed(range(tensor.dim()))))


def expanded(tensor):
    """Where the first dimension can be one that does not move: its first entry, repeated."""
    return tensor[:1].expand(tensor.shape) if tensor.dim() > 1 and tensor.shape[0] > 1 else tensor


VARIANTS = {
    "view": (viewed, (FLOAT, INTEGER)),
    "strided": (strided, (FLOAT, INTEGER)),
    "expanded": (expanded, (FLOAT,)),
    "conj": (lambda tensor: tensor.conj().resolve_conj().conj(), (COMPLEX,)),
    "neg": (lambda tensor: torch._neg_view(-tensor), (FLOAT, COMPLEX)),
    "autocast": (lambda tensor: tensor, (FLOAT, BFLOAT)),
}


def varied(value, variant):
    """Inputs as a variant has them; tensors of other kinds (sparse, empty, of one memory) stay as they are."""
    change, dtypes = VARIANTS[variant]

    def one(tensor):
        plain = isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided and tensor.numel()
        return change(tensor.detach()) if plain and tensor.dtype in dtypes else tensor

    return pytree.tree_map(one, value)


def calls_of(info, variant, count):
    """Inputs of an op, as a variant has them."""
    for dtype in VARIANTS[variant][1]:
        if dtype in info.supported_dtypes("cpu"):
            for sample in itertools.islice(info.sample_inputs("cpu", dtype), count):
                yield varied((sample.input, tuple(sample.args), dict(sample.kwargs)), variant)


def copies(call):
    """A call with its tensors copied: bits and strides as they are."""

    def bits(tensor):
        if not isinstance(tensor, torch.Tensor) or not (tensor.is_conj() or tensor.is_neg()):
            return copied(tensor)
        if tensor.is_neg():
            return torch._neg_view(-tensor)
        return tensor.resolve_conj().conj().resolve_conj().conj()

    return pytree.tree_map(bits, call)


LEFT_OUT = {
    ("nn_functional_max_pool1d", "neg"),  # torch's own kernel takes the memory of a negated view for its values
    # These take another algorithm under any mode: equal up to rounding only.
    *((name, "autocast") for name in ("linalg_cond", "linalg_eigvalsh", "linalg_svdvals")),
}


def trial(info, call, variant):
    """What became of one call: "equal", "refused: why", "as it is" where the op itself does not take it, or "WRONG"."""

    def plain(inputs):
        first, more, named = inputs
        return info.op(first, *more, **named)

    def around():
        return torch.autocast("cpu", BFLOAT) if variant == "autocast" else contextlib.nullcontext()

    fast = capture(plain, UNFUSED)
    for step, given in enumerate((call, call, varied(other_values(copies(call)), variant))):
        ours, theirs = copies(given), copies(given)
        torch.manual_seed(0)
        with torch.no_grad(), around():
            try:
                wanted = plain(theirs)
            except Exception:
                return "as it is" if step == 0 else "equal"
            torch.manual_seed(0)
            try:
                result = fast(ours)
            except CaptureError as error:
                return f"refused: {str(error)[:90]}"
            except Exception as error:
                return f"WRONG: step {step}, {type(error).__name__}: {error}"
        try:
            assert_same_bits(result, wanted)
            assert_same_bits(ours, theirs)
        except Exception as error:
            return f"WRONG: step {step}, {type(error).__name__}: {str(error)[:200]}"
    return "equal"


def whole(infos, count, tell=print):
    """Try every variant of some ops; tells what is wrong, and returns how often each outcome came."""
    outcomes = collections.Counter()
    invocations.wrapper_set_seed = lambda op, *args, **kwargs: op(*args, **kwargs)  # see tests/test_opinfo.py
    for info in infos:
        for variant in VARIANTS:
            for number, call in enumerate(calls_of(info, variant, count)):
                if (info.formatted_name, variant) in LEFT_OUT:
                    continue
                outcome = trial(info, call, variant)
                kind, _, why = outcome.partition(": ")
                outcomes[kind] += 1
                if kind == "WRONG" or (kind == "refused" and tell is print):
                    tell(f"{info.formatted_name}, {variant}, sample {number}: {kind}: {why}")
    return outcomes


def main():
    """Print what is wrong or refused, and one line at the end."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="ops; all unless given")
    parser.add_argument("--samples", type=int, default=3, help="for each op, variant and dtype")
    parser.add_argument("--part", default="0/1", help="K/N: every N-th op, from the K-th on")
    options = parser.parse_args()
    first, step = map(int, options.part.split("/"))
    infos = [info for info in INFOS if not options.names or info.name in options.names][first::step]
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    outcomes = whole(infos, options.samples)
    shown = ", ".join(f"{count} {kind}" for kind, count in sorted(outcomes.items()))
    print(f"{len(infos)} ops, {sum(outcomes.values())} calls: {shown}")
    raise SystemExit(outcomes["WRONG"] > 0)


if __name__ == "__main__":
    main()
