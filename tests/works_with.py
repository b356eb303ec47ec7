"""The table "What works with what" of docs/compatibility.md, from tests with the marker `shows`.

    @pytest.mark.shows("FSDP2", "apply_rotary_qk")
    @pytest.mark.shows("vmap", "out=", result="refused")

`pytest -m shows --works=record` runs those tests and writes the table.
"""

ROTATIONS = "apply_rotary", "apply_rotary_qk", "inplace=True", "out="
FUNCTIONS = *ROTATIONS, "cos_sin", "cos_sin_cache", "RotaryEmbedding"
OPERATOR, PLAIN = (
    f'`torch.compile(fullgraph=True)`, `lowering("{to}")`' for to in ("op", "decompose")
)
FEATURES = (
    "autograd, twice differentiable",
    "forward-mode differentiation",
    "`torch.func.vmap`",
    "`torch.func`: `jvp` of `grad`",
    OPERATOR,
    PLAIN,
    "`torch.export`",
    "`torch.library.opcheck`",
    "fake tensors",
    "inference mode",
    "autocast",
    "activation checkpointing",
    "deterministic algorithms",
    "DTensor: batch (data parallel)",
    "DTensor: sequence (context parallel)",
    "DTensor: heads (tensor parallel)",
    "FSDP2",
    "several threads at once",
    "forked workers of a `DataLoader`",
)


def claims(marks):
    """{(feature, function): result} of markers. A name that is not in the table raises."""
    shown = {}
    for mark in marks:
        feature, *functions = mark.args
        for function in functions:
            if feature not in FEATURES or function not in FUNCTIONS:
                raise ValueError(f"tests/works_with.py has no {feature!r} or no {function!r}")
            shown[feature, function] = mark.kwargs.get("result", "yes")
    return shown


def markdown(shown):
    header = ["", *(f"`{function}`" for function in FUNCTIONS)]
    rows = [[of, *(shown.get((of, function), "") for function in FUNCTIONS)] for of in FEATURES]
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


class Printed:
    """Prints the table without changes if all collected tests pass."""

    def pytest_collection_finish(self, session):
        shown = {}
        for item in session.items:
            shown |= dict(item.user_properties)["shows"]
        print(markdown(shown))


class Recorded:
    """Writes the results of the tests to a document. A claim with a failed test is left out."""

    def __init__(self, document):
        self.document, self.shown, self.failed = document, {}, set()

    def pytest_runtest_logreport(self, report):
        claims = dict(report.user_properties)["shows"]
        if report.failed:
            self.failed |= claims.keys()
        elif report.when == "call" and report.passed:
            self.shown |= claims

    def pytest_sessionfinish(self):
        shown = {cell: result for cell, result in self.shown.items() if cell not in self.failed}
        before, begin, rest = self.document.read_text(encoding="utf-8").partition(
            "<!-- works -->\n"
        )
        after = rest.partition("<!-- /works -->")[2]
        table = f"{begin}{markdown(shown)}\n<!-- /works -->"
        self.document.write_text(f"{before}{table}{after}", encoding="utf-8")
