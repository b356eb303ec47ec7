"""Every family of transformers that rotates: tiny models, patched and not.

Results are compared with float64. The error of rope_ext in float32 may be twice that of the
family's own float32 result, plus NOISE, for tensors that are only rounding errors (such as the
gradient of a bias of keys, which is zero in exact arithmetic). If a model can't run in float64, the
limit is NOISE alone. Sines with a factor of 1.0001 exceed the limit in all models but two.

With tables=True the measure has angles in float64 too: those of the family's own rotary module, in
which torch.float means float64 for that.
"""

import contextlib
import copy
import inspect
import re
import sys
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="pip install 'rope_ext[test]'")
from support import naming  # noqa: E402
from tiny_families import CASES, NOT_REACHED, NOT_RUN  # noqa: E402
from tiny_models import build, families, floats, innermost, inputs, rotations  # noqa: E402
from torch.utils._pytree import tree_map_only  # noqa: E402

from rope_ext.__main__ import main  # noqa: E402
from rope_ext.integrations.transformers import UnrecognizedRotation, patch, unpatch  # noqa: E402
from rope_ext.integrations.transformers import families as families_of_record  # noqa: E402
from rope_ext.integrations.transformers.tables import exact_tables  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
NOISE = 16 * torch.finfo(torch.float32).eps  # times the largest value of the compared tensors
NEW_TOKENS = 4
RECORD = families_of_record.load()
IS_RECORDED = transformers.__version__ == RECORD["transformers"]
recorded_release = pytest.mark.skipif(
    not IS_RECORDED, reason=f"recorded with transformers {RECORD['transformers']}"
)


# Under other releases than the recorded one, transformers 5.0 to 5.23:
ROTATED_OTHERWISE = ("deepseek_v3", "esm", "gpt_oss", "modernbert", "qwen2_5_omni", "qwen2_vl")
REFUSED = ("modernbert",)  # its attention came from a table of functions


def cases_of(family):
    return [case for case in CASES if case.family == family]


def parameters():
    """All families. Those whose conventions an earlier one covers are marked `slow`."""
    seen = set()
    for family in dict.fromkeys(case.family for case in CASES):
        conventions = {
            tuple(RECORD["families"].get(case.name, {}).get("convention", [case.name]))
            for case in cases_of(family)
        }
        if not IS_RECORDED and family in ROTATED_OTHERWISE:
            conventions = {family}
        yield pytest.param(family, marks=[pytest.mark.slow] if conventions <= seen else [])
        seen |= conventions


@pytest.mark.parametrize("family", [*parameters()])
def test_patched_models_compute_the_same(family, recording):
    called, others = set(), []  # by the models; those that do not run under another release
    for case in cases_of(family):
        with naming(case.name):
            if recording is not None:
                recording[case.name] = {"result": "failed", "reason": "see the tests"}
            result = result_of(case, called)
            if recording is not None:
                recording[case.name] = result
            elif IS_RECORDED:
                assert result == RECORD["families"][case.name]
            elif result["result"] == "not run":
                others.append(result["reason"])
            else:
                assert result["result"] == "passed" or family in REFUSED, result
    if len(others) == len(cases_of(family)):
        pytest.skip(f"does not run as for transformers {RECORD['transformers']}: {others[0]}")
    if IS_RECORDED:
        assert {*rotations(family).values()} - called == NOT_REACHED.get(family, set())


def result_of(case, called):
    """The record of a case. Adds the rotations that its model calls. Raises if the patched model's
    results differ.
    """
    try:
        everything = rotations(case.family)
        rotating = innermost(everything).keys()
        model = build(case)
        arguments = inputs(case, model)
        exact_model = copy.deepcopy(model).double() if case.float64 else None
        own, own_calls = counted(lambda: run(model, arguments))
        own_tokens = generated(model, arguments, case)
        exact = run(exact_model, in_float64(arguments)) if exact_model else own
        assert all(x.isfinite().all() for each in (own, exact) for x in each["outputs"].values())
    except Exception as error:
        if IS_RECORDED:
            raise
        return {"result": "not run", "reason": repr(error)}
    called |= {everything[code] for code in own_calls & everything.keys()}
    assert own_calls & rotating, f"expected the model to call one of {[*everything.values()]}"
    try:
        report = patch(model)
    except UnrecognizedRotation as error:
        return {"model": type(model).__name__, "result": "refused", "reason": str(error)}
    assert report.sites

    new, calls = counted(lambda: run(model, arguments))
    assert not calls & rotating, f"the patched model still calls {calls & rotating}"
    for what in ("outputs", "gradients"):
        assert_as_close(new[what], own[what], exact[what], what)
    assert generated(model, arguments, case) == own_tokens

    unpatch(model)
    again, calls = counted(lambda: outputs_of(model, arguments))
    assert calls & rotating
    for name, values in own["outputs"].items():
        assert torch.equal(again[name], values), f"output {name} after unpatch"
    return {
        "model": type(model).__name__,
        "convention": [*report.conventions],
        "sites": len(report.sites),
        "result": "passed",
        "tables": result_with_tables(model, exact_model, arguments, own, own_calls),
    }


def result_with_tables(model, exact_model, arguments, own, own_calls):
    """Why patch(model, tables=True) refuses the model, or "passed"."""
    forwards = {name: inspect.unwrap(type(m).forward) for name, m in model.named_modules()}
    try:
        report = patch(model, tables=True)
    except UnrecognizedRotation as error:
        return re.search(r"got (.*?)(: patch without|; nothing)", str(error))[1]
    with angles_in_float64(exact_model, report.tables):
        exact = run(exact_model, in_float64(arguments))
    new, calls = counted(lambda: run(model, arguments))
    replaced = {forwards[name].__code__ for name in report.tables}
    assert not calls & replaced
    assert (exact_tables.__code__ in calls) == bool(own_calls & replaced)
    for what in ("outputs", "gradients"):
        assert_as_close(new[what], own[what], exact[what], f"with tables, {what}")
    unpatch(model)
    again = outputs_of(model, arguments)
    assert all(torch.equal(again[name], x) for name, x in own["outputs"].items())
    return "passed" if own_calls & replaced else "not called"


@contextlib.contextmanager
def angles_in_float64(model, names):
    """The modules of these names compute in float64 where their code says float."""
    both = (torch, "float", torch.float32), (torch.Tensor, "float", torch.Tensor.float)

    def before(*_):
        torch.float, torch.Tensor.float = torch.float64, torch.Tensor.double

    def after(*_):
        for owner, name, value in both:
            setattr(owner, name, value)

    modules = [model.get_submodule(name) for name in names]
    hooks = [module.register_forward_pre_hook(before) for module in modules]
    hooks += [module.register_forward_hook(after, always_call=True) for module in modules]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def outputs_of(model, arguments) -> dict[int, torch.Tensor]:
    torch.manual_seed(3)
    return dict(enumerate(floats(model(**arguments))))


def run(model, arguments) -> dict[str, dict[str, torch.Tensor]]:
    """Outputs, and gradients of all parameters to a weighted sum of the outputs."""
    model.zero_grad()
    outputs = outputs_of(model, arguments)
    generator = torch.Generator().manual_seed(4)
    weights = {n: torch.randn(x.shape, generator=generator) for n, x in outputs.items()}
    sum((x * weights[n].to(x)).sum() for n, x in outputs.items() if x.requires_grad).backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    assert gradients
    return {"outputs": {n: x.detach() for n, x in outputs.items()}, "gradients": gradients}


def in_float64(arguments):
    return tree_map_only(
        torch.Tensor, lambda x: x.double() if x.is_floating_point() else x, arguments
    )


def assert_as_close(new, own, exact, what):
    assert new.keys() == own.keys() == exact.keys()
    largest = max(float(x.abs().max()) for x in exact.values() if x.numel())
    for name, truth in exact.items():
        assert new[name].isfinite().all(), f"{what}: {name}"
        if truth.numel():
            error = float((new[name] - truth).abs().max())
            allowed = 2 * float((own[name] - truth).abs().max()) + NOISE * largest
            assert error <= allowed, f"{what}: {name} is off by {error:.2g}, {allowed:.2g} allowed"


def counted(function):
    """The result, and the code objects that were called."""
    called = set()
    sys.setprofile(lambda frame, event, _: event == "call" and called.add(frame.f_code))
    try:
        return function(), called
    finally:
        sys.setprofile(None)


def generated(model, arguments, case):
    """Tokens of greedy decoding with a cache; None if a model does not generate from tokens."""
    from_tokens = all(name.endswith(("_ids", "_mask")) for name in arguments)
    if not (from_tokens and case.generates and getattr(model, "can_generate", bool)()):
        return None
    prompt = {n: x for n, x in arguments.items() if n in ("input_ids", "attention_mask")}
    lengths = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS}
    return model.generate(**prompt, **lengths, do_sample=False).tolist()


@recorded_release
def test_every_family_is_run_or_has_a_reason(recording):
    assert {case.family for case in CASES} | NOT_RUN.keys() == families().keys()
    if recording is not None:
        recording |= {name: {"result": "not run", "reason": why} for name, why in NOT_RUN.items()}


def test_record_and_page_say_the_same(recording):
    if recording is not None:
        pytest.skip("being written")
    page = (Path(__file__).parents[1] / "docs" / "compatibility.md").read_text(encoding="utf-8")
    assert "<!-- families -->" in page
    assert families_of_record.inserted(page, RECORD) == page


@recorded_release
def test_command_tells_the_record(capsys):
    assert main(["integrations"]) == 0
    printed = capsys.readouterr().out
    assert f"transformers {RECORD['transformers']}" in printed
    assert {family for family in families() if family in printed} == families().keys()
