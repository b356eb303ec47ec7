"""What a release says of itself.

    python .ci/release.py check TAG ADDRESS
    python .ci/release.py notes
    python .ci/release.py site FOLDER

`check` ends the release unless TAG is that of the version, CHANGELOG.md dates the version, and
the project's address is ADDRESS. `notes` prints the version's part of CHANGELOG.md. `site` adds to
a folder of sites, one for each version and `dev`, their list and a way to the newest.
"""

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
REDIRECT = (
    '<!doctype html><meta http-equiv="refresh" content="0; url={0}/"><a href="{0}/">{0}</a>\n'
)


def of_project(name: str) -> str:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    return re.search(rf'^{name} = "(.*?)"', text, re.M)[1]


def notes() -> str:
    """The part of CHANGELOG.md whose heading is this version with its date."""
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    version = re.escape(of_project("version"))
    part = re.search(rf"^## \[{version}\] - \d{{4}}-\d\d-\d\d\n(.*?)(?=^## |\Z)", text, re.M | re.S)
    if part is None:
        raise SystemExit(f"CHANGELOG.md: expected '## [{version}] - YYYY-MM-DD'")
    return part[1].strip()


def check(tag: str, address: str) -> None:
    notes()
    for what, expected, got in (
        ("tag", f"v{of_project('version')}", tag),
        ("repository of [tool.rope_ext] in pyproject.toml", address, of_project("repository")),
    ):
        if got != expected:
            raise SystemExit(f"expected the {what} to be {expected!r}, got {got!r}")


def site(folder: str) -> None:
    released = [path.name for path in Path(folder).glob("[0-9]*")]
    released.sort(key=lambda version: [int(part) for part in version.split(".")], reverse=True)
    names = [*released, *(["dev"] if Path(folder, "dev").is_dir() else [])]
    if not names:
        raise SystemExit(f"expected a folder for each version in {folder}, found none")
    Path(folder, "versions.json").write_text(json.dumps(names), encoding="utf-8")
    Path(folder, "index.html").write_text(REDIRECT.format(names[0]), encoding="utf-8")


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["check", tag, address]:
            check(tag, address)
        case ["notes"]:
            print(notes())
        case ["site", folder]:
            site(folder)
        case _:
            raise SystemExit(__doc__)
