"""A release: one version, the same pins and Pythons everywhere, the address, the site."""

import functools
import http.server
import importlib.util
import re
import runpy
import shutil
import threading
import time
from pathlib import Path

import pytest
import setuptools

ROOT = Path(__file__).parents[1]
SWITCH = ROOT / "docs" / "_static" / "versions.js"
ADDRESS = "https://example.org/someone/rope_ext"
PAGE = """<!doctype html>
<html data-content_root="{root}">
<script src="{root}_static/versions.js"></script>
{label}</html>"""


def text_of(path: str) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


def one(pattern: str, path: str) -> str:
    return re.search(pattern, text_of(path), re.M)[1]


@pytest.fixture
def release():
    """The module .ci/release.py."""
    spec = importlib.util.spec_from_file_location("release", ROOT / ".ci" / "release.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ---- the same everywhere


def test_version_and_date_of_the_changelog_are_those_of_the_citation(release):
    version = release.of_project("version")
    assert release.notes().startswith("### ")
    assert one(r"^version: (.+)", "CITATION.cff") == version
    date = one(rf"^## \[{re.escape(version)}\] - (.+)", "CHANGELOG.md")
    assert one(r'^date-released: "(.+)"', "CITATION.cff") == date


def test_pre_commit_runs_the_releases_that_pyproject_pins():
    hooks = re.findall(
        r"additional_dependencies: \[(.+)==(.+)\]", text_of(".pre-commit-config.yaml")
    )
    assert {name for name, _ in hooks} == {"ruff", "clang-format"}
    for name, version in hooks:
        assert f'"{name}=={version}"' in text_of("pyproject.toml")


def test_wheels_and_tests_are_for_the_pythons_of_the_classifiers():
    promised = re.findall(
        r'"Programming Language :: Python :: (3\.\d+)"', text_of("pyproject.toml")
    )
    built = re.findall(r"cp3(\d+)-", one(r'^build = "(.+)"', "pyproject.toml"))
    tested = re.findall(r'"(3\.\d+)"', one(r"python: \[(.+)\]", ".github/workflows/tests.yml"))
    assert promised[0] == one(r'^requires-python = ">=(.+)"', "pyproject.toml")
    assert promised == [f"3.{minor}" for minor in built] == tested


def test_oldest_torch_of_the_tests_is_that_of_the_package():
    oldest = one(r'^dependencies = \["torch>=(.+)"\]', "pyproject.toml")
    torches = re.findall(r"torch: \[(.+)\]", text_of(".github/workflows/tests.yml"))
    assert torches
    assert set(torches) == {f'"{oldest}.0", "newest"'}


# ---- the address


def page_on_pypi(monkeypatch, folder: Path, address: str) -> dict:
    """The arguments of setup() in setup.py, where pyproject.toml has this address."""
    known = re.sub(
        r'(?m)^repository = ".*"', f'repository = "{address}"', text_of("pyproject.toml")
    )
    (folder / "pyproject.toml").write_text(known, encoding="utf-8")
    shutil.copy(ROOT / "README.md", folder)
    monkeypatch.chdir(folder)
    given = {}
    monkeypatch.setattr(setuptools, "setup", lambda **arguments: given.update(arguments))
    runpy.run_path(str(ROOT / "setup.py"))
    return given


def test_page_on_pypi_has_absolute_links_and_a_badge(monkeypatch, tmp_path, release):
    given = page_on_pypi(monkeypatch, tmp_path, ADDRESS)
    text, tag = given["long_description"], f"v{release.of_project('version')}"
    links = re.findall(r"(?:\]\(|src=\")([^)\s\"]+)", text)
    assert [link for link in links if not re.match("https?://|#", link)] == []
    assert text.count("badge.svg") == 1
    images = [link for link in links if re.search(r"\.(png|gif)$", link)]
    assert images
    assert all(link.startswith(f"{ADDRESS}/raw/{tag}/docs/images/") for link in images)
    assert f"{ADDRESS}/blob/{tag}/CONTRIBUTING.md" in links
    assert set(given["project_urls"]) == {"Source", "Issues", "Changelog"}


def test_unknown_address_is_not_invented(monkeypatch, tmp_path):
    given = page_on_pypi(monkeypatch, tmp_path, "")
    assert given["long_description"] == text_of("README.md")
    assert given["project_urls"] == {}


def test_release_of_another_tag_or_address_is_refused(release, monkeypatch, tmp_path):
    shutil.copy(ROOT / "CHANGELOG.md", tmp_path)
    monkeypatch.setattr(release, "ROOT", tmp_path)
    pyproject = tmp_path / "pyproject.toml"
    version = one(r'^version = "(.+)"', "pyproject.toml")
    pyproject.write_text(f'version = "{version}"\nrepository = "{ADDRESS}"\n')
    release.check(f"v{version}", ADDRESS)
    with pytest.raises(SystemExit, match=r"expected the tag to be 'v.*', got 'v9\.9\.9'"):
        release.check("v9.9.9", ADDRESS)
    with pytest.raises(SystemExit, match=f"expected the repository .* got '{ADDRESS}'"):
        release.check(f"v{version}", f"{ADDRESS}_2")
    pyproject.write_text(f'version = "9.9.9"\nrepository = "{ADDRESS}"\n')
    with pytest.raises(SystemExit, match=r"CHANGELOG\.md: expected"):
        release.check("v9.9.9", ADDRESS)


# ---- the site


def test_site_lists_versions_newest_first_and_opens_the_newest(release, tmp_path):
    with pytest.raises(SystemExit, match="found none"):
        release.site(str(tmp_path))
    for name in ("0.2.0", "0.10.0", "dev", "_other"):
        (tmp_path / name).mkdir()
    release.site(str(tmp_path))
    assert (tmp_path / "versions.json").read_text() == '["0.10.0", "0.2.0", "dev"]'
    assert 'url=0.10.0/"' in (tmp_path / "index.html").read_text()


@pytest.fixture
def served(tmp_path):
    """A folder, and the address of a server for it."""
    quiet = {"log_message": lambda *_: None}
    handler = type("Handler", (http.server.SimpleHTTPRequestHandler,), quiet)
    handler = functools.partial(handler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.handle_error = lambda *_: None  # a browser that leaves a page closes connections
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield tmp_path, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_switch_leads_to_the_same_page_of_another_version_or_to_its_start(release, served):
    pytest.importorskip("selenium", reason="pip install 'rope_ext[test]'")
    from browser import Browser, programs

    if programs() is None:
        pytest.skip("no browser: install chromium and chromium-driver")
    folder, address = served
    label = text_of("docs/_templates/sidebar/versions.html")
    for version, pages in (("0.2.0", ["index", "api/new"]), ("0.1.0", ["index"])):
        for page in pages:
            path = folder / "site" / version / f"{page}.html"
            path.parent.mkdir(parents=True, exist_ok=True)
            root = "../" * page.count("/") or "./"
            path.write_text(PAGE.format(root=root, label=label))
        (folder / "site" / version / "_static").mkdir()
        shutil.copy(SWITCH, folder / "site" / version / "_static")
    release.site(str(folder / "site"))
    browser = Browser()

    def wait_for(expression, expected):
        limit = time.monotonic() + 60
        while (got := browser.evaluate(expression)) != expected and time.monotonic() < limit:
            time.sleep(0.05)
        assert got == expected

    def choose(version):
        browser.evaluate(f"""select = document.querySelector("select"); select.value = "{version}";
                  select.dispatchEvent(new Event("change"))""")

    try:
        browser.call("Page.navigate", {"url": f"{address}/site/"})
        wait_for("location.pathname", "/site/0.2.0/")
        shown = '[...document.querySelectorAll("option")].map((o) => o.text + o.selected).join()'
        wait_for(shown, "0.2.0true,0.1.0false")
        choose("0.1.0")
        wait_for("location.pathname + document.readyState", "/site/0.1.0/complete")
        browser.call("Page.navigate", {"url": f"{address}/site/0.2.0/api/new.html"})
        wait_for(shown, "0.2.0true,0.1.0false")
        choose("0.1.0")  # has no such page
        wait_for("location.pathname", "/site/0.1.0/")
        shutil.copytree(folder / "site" / "0.2.0", folder / "alone")
        browser.call("Page.navigate", {"url": f"{address}/alone/"})
        asked = 'performance.getEntriesByType("resource").map((e) => e.name)'
        wait_for(f'{asked}.includes("{address}/versions.json")', True)
        assert browser.evaluate('document.querySelector("label").hidden')
    finally:
        browser.close()
