"""Mutants by the room of the product that they are in. All are reviewed: none is equivalent.

Each file says of each group of mutants why they change what the product does.
"""

from rooms import boxing, checks, cpu, cuda, engines, formulas, frequencies, functions, integrations
from rooms.mutant import Mutant

# The mutants of cuda are found by the tests marked cuda; those of formulas by the tests of the CPU
# too.
ROOMS: dict[str, list[Mutant]] = {
    "checks": checks.MUTANTS,
    "boxing": boxing.MUTANTS,
    "cpu": cpu.MUTANTS,
    "formulas": formulas.MUTANTS,
    "cuda": cuda.MUTANTS,
    "engines": engines.MUTANTS,
    "functions": functions.MUTANTS,
    "frequencies": frequencies.MUTANTS,
    "integrations": integrations.MUTANTS,
}
