"""The README's Python examples run, from top to bottom, as one program; its commands exist."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README.read_text(), re.S | re.M)


def test_examples_run():
    examples = blocks("python")
    assert len(examples) >= 6
    namespace: dict[str, object] = {}
    for example in examples:
        exec(compile(example, str(README), "exec"), namespace)


@pytest.mark.parametrize("name", ["demo", "test"])
def test_command_is_one_line_of_shell(name: str):
    match = re.search(
        rf"^<!-- {name} command -->\n```sh\n(.*?)^```$", README.read_text(), re.S | re.M
    )
    assert match is not None
    assert match[1].count("\n") == 1
    assert match[1].startswith("pip install ")


def test_who_can_do_what_leads_to_tests():
    table = re.search(r"<!-- who -->\n(.*?)<!-- /who -->", README.read_text(), re.S)[1]
    rows = table.strip().splitlines()[2:]
    claims = [re.search(r"\| \[yes\]\((tests/\w+\.py) \"(test_\w+)\"\) \|", row) for row in rows]
    assert len(rows) >= 20
    for row, claim in zip(rows, claims, strict=True):
        assert claim is not None, row
        source = (README.parent / claim[1]).read_text()
        assert re.search(rf"^def {claim[2]}\(", source, re.M), row
