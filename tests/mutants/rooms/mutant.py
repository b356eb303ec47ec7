"""A mutant: one line of the product with a bug in it, and the tests that should find it."""

from typing import NamedTuple


class Mutant(NamedTuple):
    name: str  # unique, a few words with hyphens
    file: str  # from the root of the repository
    before: str  # text that is there once, within one line
    after: str
    tests: tuple[str, ...]  # files of tests/, the most likely ones to find it first


def mutants(file: str, tests: str, *rows: tuple[str, str, str]) -> list[Mutant]:
    """Mutants of one file: (name, before, after) each. tests: names of test files, in order."""
    files = tuple(f"tests/{test}.py" for test in tests.split())
    return [Mutant(name, file, before, after, files) for name, before, after in rows]
