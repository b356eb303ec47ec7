"""The pages of docs/: examples run, links are valid, and the site has every public name."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import rope_ext
from rope_ext import frequencies, positions
from rope_ext.integrations import reference_apis

DOCS = Path(__file__).parents[1] / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
WITH_EXAMPLES = [page for page in PAGES if "```python" in page.read_text()]


def named(page: Path) -> str:
    return str(page.relative_to(DOCS))


@pytest.mark.parametrize("page", WITH_EXAMPLES, ids=named)
def test_examples_run(page: Path):
    """Top to bottom, as one program."""
    examples = re.findall(r"^```python\n(.*?)^```$", page.read_text(), re.S | re.M)
    assert any("assert" in example for example in examples)
    namespace: dict[str, object] = {}
    for example in examples:
        exec(compile(example, str(page), "exec"), namespace)


def test_pages_that_promise_examples_have_them():
    pages = {named(page) for page in WITH_EXAMPLES}
    migrations = {named(page) for page in (DOCS / "migrate").glob("*.md")}
    assert len(migrations) == 5
    assert pages == {"guide.md", "precision.md"} | migrations


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links_lead_to_files(page: Path):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if not link.startswith(("https://", "#")):
            assert (page.parent / link.partition("#")[0]).is_file(), link


def test_site_has_every_public_name(tmp_path: Path):
    """Built with warnings as errors, also for docstrings that are not valid reStructuredText."""
    inventories = pytest.importorskip("sphinx.util.inventory")
    command = [sys.executable, "-m", "sphinx", "-qW", "-d", tmp_path / "doctrees", DOCS, tmp_path]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    inventory = (tmp_path / "objects.inv").read_bytes()
    objects = inventories.InventoryFile.loads(inventory, uri="").data
    found = {name for kind, names in objects.items() if kind.startswith("py:") for name in names}
    expected = {f"rope_ext.{name}" for name in rope_ext.__all__}
    for module in (frequencies, positions, reference_apis):
        expected |= {f"{module.__name__}.{name}" for name in module.__all__}
    assert expected <= found, expected - found
