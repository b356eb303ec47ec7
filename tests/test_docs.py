"""README.md and the pages of docs/: blocks run, links lead somewhere, the site has every name."""

import json
import multiprocessing
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import rope_ext
from rope_ext import frequencies, positions
from rope_ext.integrations import reference_apis

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
HEAVY = re.compile(r"torch\.compile|torch\.export|\.generate\(")
WITHOUT = ("accelerate", "cycler", "gguf", "matplotlib", "transformers")  # of other extras


def named(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks():
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for match in re.finditer(r"^```python\n(.*?)^```$", text, re.S | re.M):
            where = f"{named(page)}:{text.count(chr(10), 0, match.start()) + 2}"
            marks = [pytest.mark.slow] if HEAVY.search(match[1]) else []
            if page.parent.name == "integrations" and page.stem != "index":
                absent = find_spec(page.stem) is None  # .ci/run has them in a stage of their own
                marks = [pytest.mark.skipif(absent, reason=f"{page.stem} is not installed")]
            yield pytest.param(match[1], id=where, marks=marks)


@pytest.fixture(scope="module")
def fresh_process():
    """A pool of one process that is new for each task: a fork of one that has imported torch."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["rope_ext", "transformers.models.llama.modeling_llama"])
    with context.Pool(1, maxtasksperchild=1) as pool:
        yield pool


@pytest.mark.parametrize("block", list(blocks()))
def test_block_runs_when_copied(block: str, fresh_process, tmp_path: Path):
    script = tmp_path / "block.py"
    script.write_text(block, encoding="utf-8")
    fresh_process.apply(exec, (f"import runpy; runpy.run_path({str(script)!r})",))


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links_lead_to_files_and_headings(page: Path):
    for link in re.findall(r"(?:\]\(|src=\")([^)\s\"]+)", page.read_text(encoding="utf-8")):
        if link.startswith("https://"):
            continue
        path, _, heading = link.partition("#")
        target = (page.parent / path) if path else page
        assert target.exists(), link
        if heading:
            headings = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.M)
            slugs = {re.sub(r"[^\w\- ]", "", each.lower()).replace(" ", "-") for each in headings}
            assert heading in slugs, link


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Built with warnings as errors, and without the packages of other extras than docs."""
    folder = tmp_path_factory.mktemp("site")
    pytest.importorskip("sphinx")
    program = f"""
import os, sys
sys.path[0] = os.getcwd()
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {WITHOUT}:
            raise ModuleNotFoundError(name, name=name)
sys.meta_path.insert(0, Hidden())
from sphinx.cmd.build import main
sys.exit(main(sys.argv[1:]))
"""
    command = [sys.executable, "-c", program, "-qW", "-d", folder / "doctrees", DOCS, folder]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    return folder


def test_site_has_every_public_name(site: Path):
    from sphinx.util.inventory import InventoryFile

    objects = InventoryFile.loads((site / "objects.inv").read_bytes(), uri="").data
    found = {name for kind, names in objects.items() if kind.startswith("py:") for name in names}
    expected = {f"rope_ext.{name}" for name in rope_ext.__all__}
    for module in (frequencies, positions, reference_apis):
        expected |= {f"{module.__name__}.{name}" for name in module.__all__}
    assert expected <= found, expected - found


def test_site_shows_types_and_finds_install(site: Path):
    operators = re.sub("<[^>]+>", "", (site / "api" / "operators.html").read_text("utf-8"))
    assert re.search(r"apply_rotary\(\s*x: Tensor,\s*cos: Tensor,", operators)
    index = (site / "searchindex.js").read_text("utf-8")
    words = json.loads(index[index.index("(") + 1 : index.rindex(")")])["titleterms"]
    assert words.keys() & {"install", "instal"}  # as the stemmer has it


def test_who_can_do_what_leads_to_tests():
    page = (DOCS / "compatibility.md").read_text(encoding="utf-8")
    rows = re.search(r"<!-- who -->\n(.*?)<!-- /who -->", page, re.S)[1].strip().splitlines()[2:]
    assert len(rows) >= 20
    for row in rows:
        ours = row.split(" | ")[1]
        if claim := re.search(r"\(\.\./(tests/\w+\.py) \"(test_\w+)\"\)", ours):
            assert re.search(rf"^def {claim[2]}\(", (ROOT / claim[1]).read_text(), re.M), row
        else:
            assert "yes" not in ours, row
