"""The scripts and the notebook of examples/ run at a small size, and end with what they show."""

import json
import re
import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
# Arguments, and what the last lines say.
RUNS = {
    "meta_weights.py": ([], r"differ\nby \d\.\de-0[4-7]; .*\n.* same bits, True\."),
    "paged_server.py": (["--requests=5"], r"5 requests in \d\d steps, .*\n.* that it gets alone\."),
    "extend_context.py": (["--steps=2"], r"past 128 tokens, .*\n.* by [+-]\d\.\d{3} with YaRN"),
    "train_llama.py": (["--steps=3"], r"loss is within 0\.[0-4]% of the eager one's"),
}
COMPILED = pytest.param("train_llama.py", marks=pytest.mark.slow)


@pytest.mark.parametrize("name", [*list(RUNS)[:-1], COMPILED])
def test_script_ends_with_what_it_shows(name, monkeypatch, capsys):
    pytest.importorskip("transformers", reason="pip install 'rope_ext[test]'")
    arguments, shown = RUNS[name]
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    monkeypatch.syspath_prepend(EXAMPLES)
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    assert re.search(f"Shown: .*{shown}", capsys.readouterr().out, re.S)


def test_notebook_prints_what_it_has_stored(capsys):
    pytest.importorskip("matplotlib", reason="pip install 'rope_ext[viz]'")
    notebook = json.loads((EXAMPLES / "pictures.ipynb").read_text())
    space = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), space)
            stored = ["".join(o["text"]) for o in cell["outputs"] if o["output_type"] == "stream"]
            assert capsys.readouterr().out == "".join(stored)
    assert stored[0].startswith("shown: ")
