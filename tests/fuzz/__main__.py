"""``python -m tests.fuzz SECONDS [FIRST_SEED]``: random programs until the time is over; what differs is printed."""

import sys
import time
import warnings

import torch

from tests.fuzz.programs import Program, trial

if __name__ == "__main__":
    seconds, seed = float(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    end, count, findings = time.monotonic() + seconds, 0, 0
    while time.monotonic() < end:
        program = Program(seed)
        for target in ("c", "ninetoothed"):
            found = trial(program, target)
            if found is not None:
                findings += 1
                print(f"seed {seed}, {target}: {found}\n{program}\n", flush=True)
        count, seed = count + 1, seed + 1
    print(f"{count} programs, {findings} findings")
    raise SystemExit(bool(findings))
