"""The README's Python examples run, from top to bottom, as one program; its commands are there."""

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
