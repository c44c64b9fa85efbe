"""Two hundred random programs, the same each time; ``make fuzz`` runs others for ten minutes."""

import pytest

from tests.beside_eager import on_the_cpu
from tests.fuzz.programs import Program, trial

pytestmark = on_the_cpu


@pytest.mark.parametrize("first", range(0, 200, 10))
def test_random_programs_are_as_they_are(first):
    wrong = []
    for seed in range(first, first + 10):
        target = "ninetoothed" if seed % 4 == 0 else "c"
        program = Program(seed)
        found = trial(program, target)
        if found is not None:
            wrong.append(f"seed {seed}, {target}: {found}\n{program}")
    assert not wrong, "\n\n".join(wrong)
