"""The list of mutants fits the product: the text that each one changes is there, once."""

from collections import Counter
from pathlib import Path

import pytest
from rooms import ROOMS

REPOSITORY = Path(__file__).parents[2]
MUTANTS = [mutant for room in ROOMS.values() for mutant in room]


@pytest.mark.parametrize("room", ROOMS)
def test_every_mutant_changes_text_that_is_there_once(room):
    times = {m.name: (REPOSITORY / m.file).read_text("utf-8").count(m.before) for m in ROOMS[room]}
    assert [f"{name}: {count} times" for name, count in times.items() if count != 1] == []


def test_a_mutant_is_one_line_another_one_and_has_tests():
    assert [name for name, count in Counter(m.name for m in MUTANTS).items() if count > 1] == []
    assert [m.name for m in MUTANTS if m.before == m.after or "\n" in m.before.rstrip("\n")] == []
    missing = {test for m in MUTANTS for test in m.tests if not (REPOSITORY / test).is_file()}
    assert missing == set()
    assert len(MUTANTS) >= 130
