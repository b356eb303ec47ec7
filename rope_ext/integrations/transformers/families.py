"""The model families of transformers that `patch(model)` was tested on: a record of the tests.

`pytest --record-families` writes it, and tests/test_model_families.py compares later runs to it.
"""

import json
import re
import textwrap
from importlib import resources
from typing import Any

RECORD = "families.json"  # beside this file
NOT_PASSED = ("refused", "failed", "not run")


def load() -> dict[str, Any]:
    """The record: the version of transformers, and the result of each model."""
    text = (
        resources.files("rope_ext.integrations.transformers")
        .joinpath(RECORD)
        .read_text(encoding="utf-8")
    )
    return json.loads(text)


def family(name: str) -> str:
    """The family of a model name in the record, which may have a class in brackets."""
    return name.partition(" ")[0]


def by_convention(record: dict[str, Any]) -> dict[str, list[str]]:
    """The families that passed, grouped by convention, the largest group first."""
    groups: dict[str, dict[str, None]] = {}
    for name, model in record["families"].items():
        if model["result"] == "passed":
            for convention in model["convention"]:
                groups.setdefault(convention, {})[family(name)] = None
    return {group: [*names] for group, names in sorted(groups.items(), key=_by_size)}


def _by_size(group: tuple[str, dict[str, None]]) -> tuple[int, str]:
    return -len(group[1]), group[0]


def summary(record: dict[str, Any]) -> str:
    results = [model["result"] for model in record["families"].values()]
    passed = {family(n) for n, m in record["families"].items() if m["result"] == "passed"}
    others = [f"{results.count(result)} {result}" for result in NOT_PASSED if result in results]
    return ", ".join(
        [
            f"transformers {record['transformers']}: {results.count('passed')} models of "
            f"{len(passed)} families passed",
            *others,
        ]
    )


def exceptions(record: dict[str, Any]) -> list[str]:
    """The models that did not pass, each with the reason."""
    return [
        f"{name}: {model['result']}, {model['reason']}"
        for result in NOT_PASSED
        for name, model in record["families"].items()
        if model["result"] == result
    ]


def without_tables(record: dict[str, Any]) -> list[str]:
    """The models that passed, but not with tables=True, each with the reason."""
    return [
        f"{name}: {model['tables']}"
        for name, model in record["families"].items()
        if model.get("tables", "passed") != "passed"
    ]


def with_tables(record: dict[str, Any]) -> str:
    passed = [model.get("tables") for model in record["families"].values()].count("passed")
    return f"With `tables=True` {passed} models passed"


def text(record: dict[str, Any]) -> str:
    """The record for a terminal."""
    lines = [summary(record)]
    for convention, names in by_convention(record).items():
        lines += ["", f"{convention} ({len(names)})"]
        lines += textwrap.wrap(", ".join(names), 96, initial_indent="  ", subsequent_indent="  ")
    lines += ["", *exceptions(record), "", f"{with_tables(record)}, it refuses:"]
    return "\n".join([*lines, *without_tables(record)])


def markdown(record: dict[str, Any]) -> str:
    """The record as a table for docs/compatibility.md."""
    rows = [
        f"| {convention} | {', '.join(names)} |"
        for convention, names in by_convention(record).items()
    ]
    lines = [summary(record) + ".", "", "| rotation | families |", "|---|---|", *rows]
    if left := exceptions(record):
        lines += ["", "Not among them:", "", *(f"- {line}" for line in left)]
    if left := without_tables(record):
        lines += ["", f"{with_tables(record)}. It refuses the others:", ""]
        lines += [f"- {line}" for line in left]
    return "\n".join(lines)


def inserted(document: str, record: dict[str, Any]) -> str:
    """A document with the table between its markers."""
    begin, end = "<!-- families -->", "<!-- /families -->"
    return re.sub(
        f"{begin}.*?{end}",
        lambda _: f"{begin}\n{markdown(record)}\n{end}",
        document,
        flags=re.DOTALL,
    )
