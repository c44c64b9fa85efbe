"""``python -m tests.fuzz.mutants COUNT``: mutants of saved graphs, and how they ended."""

import random
import sys
import tempfile
from collections import Counter
from pathlib import Path

import torch

from tests.fuzz.files import attempt, example, mutant, parts_of, write

if __name__ == "__main__":
    count, ends = int(sys.argv[1]), Counter[str]()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        samples = [example(Path(name), kind) for kind in ("rows", "attention")]
        chance = random.Random(1)
        for number in range(count):
            path, arguments, _ = samples[number % len(samples)]
            table, tensors = parts_of(path)
            mutated = path.with_name("mutant.safetensors")
            write(mutated, mutant(table, chance), tensors)
            ends[attempt(mutated, arguments)] += 1
    print(f"{count} mutants: {dict(ends)}")
