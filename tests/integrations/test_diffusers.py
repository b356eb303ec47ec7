"""diffusers itself: tiny models, patched and not, on the CPU.

In float32 the outputs and gradients of a patched model may differ from its own by some 16 roundings
of the largest. In bfloat16 they may be off by twice as much as its own are, from those in float32.

`python tests/integrations/test_diffusers.py` writes the list of classes in the docs page.
"""

import copy
import io
import re
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from torch.utils._pytree import tree_leaves, tree_map_only

sys.path.append(str(Path(__file__).parents[1]))  # where this file is run
diffusers = pytest.importorskip("diffusers")
from support import small_llama  # noqa: E402
from tiny_diffusers import MODELS, numbers  # noqa: E402

from rope_ext.integrations.diffusers import (  # noqa: E402
    UnrecognizedRotation,
    patch,
    patched,
    rotations,
    unpatch,
)
from rope_ext.integrations.diffusers.loaded_models import _DIFFUSERS  # noqa: E402
from rope_ext.integrations.patching.models import substituted  # noqa: E402

PAGE = Path(__file__).parents[2] / "docs" / "integrations" / "diffusers.md"
MARKERS = "<!-- classes -->", "<!-- /classes -->"
RELEASE = version("diffusers")


def name_of(row):
    return f"{row.name} ({row.variant})" if row.variant else row.name


def named(name):
    return next(row for row in MODELS if name_of(row) == name)


class Calls:
    """Counts the calls of rope_ext's operator in a block, and notes how they pair channels."""

    def __enter__(self):
        self.count, self.pairs, self._rotate = 0, set(), rotations.rotate
        rotations.rotate = self._counted
        return self

    def __exit__(self, *_):
        rotations.rotate = self._rotate

    def _counted(self, pairs, *args):
        self.count += 1
        self.pairs.add("interleaved" if pairs.interleaved else "half-split")
        return self._rotate(pairs, *args)


def floats(values):
    """The floating tensors in an output, which may be nested."""
    return [x for x in tree_leaves(values) if isinstance(x, torch.Tensor) and x.is_floating_point()]


def run(model, row, dtype=torch.float32):
    """The outputs, and the gradients of the parameters to a weighted sum of them."""
    torch.manual_seed(1)
    arguments = tree_map_only(
        torch.Tensor, lambda x: x.to(dtype) if x.is_floating_point() else x, row.arguments()
    )
    with torch.set_grad_enabled(row.differentiable):
        outputs = floats(_values(model(**arguments)))
    assert outputs
    assert all(x.isfinite().all() for x in outputs)
    if not row.differentiable:
        return outputs, []
    total = sum((x.float() * numbers(*x.shape)).sum() for x in outputs)
    parameters = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(total, parameters, allow_unused=True)
    return [x.detach() for x in outputs], [g for g in gradients if g is not None]


def _values(output):
    return [*output.values()] if isinstance(output, dict) else output


def distance(values, others):
    """The largest difference, relative to the largest value."""
    largest = max(float(x.abs().max()) for x in others if x.numel())
    differences = [
        float((x - y).abs().max()) for x, y in zip(values, others, strict=True) if x.numel()
    ]
    return max(differences) / largest


def error(values, exact):
    """The norm of all differences, relative to that of the values."""
    flat, truth = (torch.cat([x.flatten().double() for x in each]) for each in (values, exact))
    return float((flat - truth).norm() / truth.norm())


def result_of(row):
    """What the page says of a class. Raises if the patched model's results differ."""
    model = row.build().eval()
    classes = [type(part) for _, part in _DIFFUSERS.parts("patch", model)]
    own = run(model, row) if row.arguments() else None
    try:
        report = patch(model)
    except UnrecognizedRotation as refusal:
        assert [type(part) for _, part in _DIFFUSERS.parts("patch", model)] == classes
        return "refused", re.search(r"got (.*?)(?:; nothing has been changed)?$", str(refusal))[1]
    assert report.sites
    if row.not_run:
        return "not run", row.not_run
    with Calls() as calls:
        new = run(model, row)
    assert calls.count
    for a, b in zip(new, own, strict=True):
        assert not b or distance(a, b) <= row.tolerance

    if row.bfloat16:
        new = run(model.bfloat16(), row, torch.bfloat16)
    unpatch(model)
    if row.bfloat16:
        own = run(model, row, torch.bfloat16)
    exact = run(model.float(), row)
    for a, b, truth in zip(new, own, exact, strict=True):
        assert not row.bfloat16 or not truth or error(a, truth) <= 2 * error(b, truth)

    assert [type(part) for _, part in _DIFFUSERS.parts("patch", model)] == classes
    with Calls() as none:
        assert all(torch.equal(a, b) for a, b in zip(run(model, row)[0], exact[0], strict=True))
    assert not none.count
    with substituted(_DIFFUSERS, model, larger_by(max(0.01, 256 * row.tolerance))):
        assert distance(run(model, row)[0], exact[0]) > row.tolerance
    return "passed", " and ".join(sorted(calls.pairs))


def larger_by(part):
    """Makes rotations that the comparison must find."""

    def larger(function, rotation):
        def rotate(*args, **kwargs):
            return tree_map_only(torch.Tensor, lambda x: (1 + part) * x, function(*args, **kwargs))

        return rotate

    return larger


def recorded():
    """The result of each class, from the page."""
    results = {}
    block = PAGE.read_text(encoding="utf-8").partition(MARKERS[0])[2].partition(MARKERS[1])[0]
    for line in block.splitlines():
        if row := re.fullmatch(r"\| (interleaved|half-split)(.*?) \| (.*) \|", line):
            results |= {name: ("passed", row[1] + row[2]) for name in row[3].split(", ")}
        elif row := re.fullmatch(r"\| (refused|not run) \| `(\w+)`: (.*) \|", line):
            results[row[2]] = (row[1], row[3])
    return results


def markdown(results):
    passed = [name for name, (result, _) in results.items() if result == "passed"]
    classes = len({name.partition(" ")[0] for name in passed})
    others = [result for result, _ in results.values() if result != "passed"]
    counts = [f"{others.count(result)} {result}" for result in sorted({*others}, reverse=True)]
    lines = [
        f"diffusers {RELEASE}: {classes} classes passed, {', '.join(counts)}.",
        "",
        "| pairs | classes |",
        "|---|---|",
    ]
    for pairs in dict.fromkeys(what for result, what in results.values() if result == "passed"):
        names = [name for name, result in results.items() if result == ("passed", pairs)]
        lines.append(f"| {pairs} | {', '.join(names)} |")
    for other in sorted({*others}, reverse=True):
        whys = [(name, why) for name, (result, why) in results.items() if result == other]
        lines += [f"| {other} | `{name}`: {why} |" for name, why in whys]
    return "\n".join(lines)


@pytest.mark.parametrize("name", [name_of(row) for row in MODELS])
def test_patched_models_compute_the_same_as_the_page_says(name):
    assert result_of(named(name)) == recorded()[name]


def test_the_page_lists_the_tested_classes_and_release():
    assert recorded().keys() == {name_of(row) for row in MODELS}
    assert f"diffusers {RELEASE}: " in PAGE.read_text(encoding="utf-8")


@pytest.fixture
def flux():
    return named("FluxTransformer2DModel").build().eval()


def count(model, row=None):
    with Calls() as calls:
        run(model, row or named("FluxTransformer2DModel"))
    return calls.count


def test_a_pipeline_gives_the_same_latents():
    row = named("FluxTransformer2DModel")
    pipeline = diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=None,
        text_encoder=small_llama(1),  # it rotates, but is of another library: passed over
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=diffusers.FluxTransformer2DModel(**{**row.config, "in_channels": 16}),
    )
    pipeline.set_progress_bar_config(disable=True)

    def latents():
        return pipeline(
            prompt_embeds=numbers(1, 5, 32),
            pooled_prompt_embeds=numbers(1, 8),
            height=64,
            width=48,
            num_inference_steps=2,
            output_type="latent",
            generator=torch.Generator().manual_seed(0),
        ).images

    own = latents()
    report = patch(pipeline)
    assert report.modules[0] == "transformer.transformer_blocks.0.attn.processor"
    with Calls() as calls:
        new = latents()
    assert calls.count == 2 * 4
    assert distance([new], [own]) <= row.tolerance
    unpatch(pipeline)
    with Calls() as calls:
        assert torch.equal(latents(), own)
    assert not calls.count


def test_a_block_restores_the_model(flux):
    with patched(flux) as report:
        assert len(report.sites) == 2
        assert count(flux) == 4
    assert count(flux) == 0


def test_copies_are_patched_and_saved_models_are_not(flux):
    patch(flux)
    assert count(copy.deepcopy(flux)) == 4
    file = io.BytesIO()
    torch.save(flux, file)
    file.seek(0)
    assert count(torch.load(file, weights_only=False)) == 0


def test_new_processors_need_another_patch(flux):
    patch(flux)
    attention = flux.transformer_blocks[0].attn
    attention.set_processor(type(attention)._default_processor_cls())
    assert count(flux) == 2
    patch(flux)
    assert count(flux) == 4


@pytest.mark.parametrize(
    "name",
    ["FluxTransformer2DModel", "WanTransformer3DModel", "LTX2VideoTransformer3DModel (split)"],
)
def test_a_patched_model_is_one_graph(name):
    row = named(name)
    model = row.build().eval()
    own = run(model, row)[0]
    patch(model)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        new = floats(_values(compiled(**row.arguments())))
    assert distance(new, own) <= row.tolerance


def test_options_that_the_function_refuses_are_refused_as_before(flux):
    from diffusers.models import embeddings

    replacement = _DIFFUSERS.recognize(embeddings.apply_rotary_emb).replacement
    for options, message in (
        ({"use_real_unbind_dim": 1}, "use_real_unbind_dim=1"),
        ({"sequence_dim": 3}, "sequence_dim=3"),
    ):
        with pytest.raises(ValueError, match=message):
            replacement(numbers(1, 2, 3, 4), (numbers(3, 4), numbers(3, 4)), **options)


def test_a_model_without_a_rotation_and_what_is_no_model_are_refused(flux):
    plain = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, num_layers=1, sample_size=4, norm_num_groups=2
    )
    with pytest.raises(UnrecognizedRotation, match="got DiTTransformer2DModel without any"):
        patch(plain)
    for wrong in ("flux", diffusers.FluxTransformer2DModel, flux.config, None):
        for function in (patch, unpatch):
            with pytest.raises(
                TypeError, match=f"{function.__name__}: expected model to be a loaded"
            ):
                function(wrong)


if __name__ == "__main__":
    page = PAGE.read_text(encoding="utf-8")
    before, after = page.partition(MARKERS[0])[0], page.partition(MARKERS[1])[2]
    results = {name_of(row): result_of(row) for row in MODELS}
    PAGE.write_text(
        f"{before}{MARKERS[0]}\n{markdown(results)}\n{MARKERS[1]}{after}", encoding="utf-8"
    )
