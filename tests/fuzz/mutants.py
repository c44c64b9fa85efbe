"""``python -m tests.fuzz.mutants COUNT [FIRST]``: mutants of saved graphs by their numbers, and how they ended."""

import random
import sys
import tempfile
from collections import Counter
from pathlib import Path

import torch

from tests.fuzz.files import attempt, example, mutant, parts_of, write

STEP = 250  # mutants after which a line is printed

if __name__ == "__main__":
    count, first = int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0
    ends = Counter[str]()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        samples = [example(Path(name), kind) for kind in ("rows", "attention")]
        for number in range(first, first + count):
            path, arguments, _ = samples[number % len(samples)]
            table, tensors = parts_of(path)
            mutated = path.with_name("mutant.safetensors")
            write(mutated, mutant(table, random.Random(number)), tensors)
            try:
                ends[attempt(mutated, arguments)] += 1
            except AssertionError as error:
                ends["wrong"] += 1
                print(f"mutant {number}: {error}", flush=True)
            if (number + 1) % STEP == 0:
                print(f"up to {number}: {dict(ends)}", flush=True)
    print(f"{count} mutants: {dict(ends)}")
    raise SystemExit(bool(ends["wrong"]))
