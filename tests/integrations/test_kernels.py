"""The folder for the package `kernels`, loaded by that package from a local path."""

import ast
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
import torch
from support import assert_same_bits, naming, random, random_table, small_llama

pytest.importorskip("kernels")

import kernels
from kernels._rust import Digest, DigestAlgorithm, Metadata

import rope_ext
from rope_ext.integrations import kernels_folder
from rope_ext.integrations.kernels_folder import main, write

PACKAGE = Path(rope_ext.__file__).parent
CPU = sysconfig.get_platform().partition("-")[2]
WHEEL = f"rope_ext-{rope_ext.__version__}-{{0}}-{{0}}-linux_{CPU}.whl".format
PYTHON = f"cp{sys.version_info.major}{sys.version_info.minor}"
COMPILED = Path(rope_ext._C.__file__).name
INFO = rope_ext._C.build_info()
BACKEND = f"cu{INFO['cuda_version'].replace('.', '')}" if INFO["cuda"] else "cpu"
VARIANT = f"torch-stable-abi210-{BACKEND}-{CPU}-linux"
MODES = [
    kernels.Mode.INFERENCE,
    kernels.Mode.TRAINING,
    kernels.Mode.INFERENCE | kernels.Mode.TORCH_COMPILE,
    kernels.Mode.TRAINING | kernels.Mode.TORCH_COMPILE,
]
B, H, S, D = 2, 3, 5, 16


def wheel_in(folder, python=PYTHON, **changed):
    """A wheel of the package as it is, but for some of its files."""
    path = Path(folder, WHEEL(python))
    tag = sys.implementation.cache_tag
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(PACKAGE.rglob("*")):
            name = file.relative_to(PACKAGE).as_posix()
            if (
                file.is_file()
                and "__pycache__" not in name
                and (file.suffix != ".so" or name == COMPILED)
            ):
                content = changed.get(name, file.read_bytes())
                archive.writestr(
                    f"rope_ext/{name.replace(tag, python.replace('cp', 'cpython-'))}", content
                )
        archive.writestr(f"rope_ext-{rope_ext.__version__}.dist-info/METADATA", "Name: rope_ext\n")
    return path


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """The folder, made by the command."""
    folder = tmp_path_factory.mktemp("kernel")
    wheel = wheel_in(tmp_path_factory.mktemp("wheels"))
    assert main([str(wheel), str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def variant(repository):
    (path,) = repository.joinpath("build").iterdir()
    return path


def loadable(repository, variant):
    """What to load.

    `kernels` selects a variant of the torch that runs, so a build with CUDA beside a torch without
    is given by its own folder.
    """
    return variant if INFO["cuda"] and not torch.version.cuda else repository


@pytest.fixture(scope="module")
def location(repository, variant):
    return loadable(repository, variant)


@pytest.fixture(scope="module")
def kernel(location):
    return kernels.get_local_kernel(location)


def calls_of(kernel, function):
    with torch.profiler.profile() as profile:
        result = function()
    prefix = f"{kernel.__name__}::"
    return result, sum(e.count for e in profile.key_averages() if e.key.startswith(prefix))


# ---- the rules of the hub


def test_the_variant_is_that_of_the_build_and_is_preferred(repository, variant, monkeypatch):
    assert variant.name == VARIANT
    monkeypatch.setattr(torch.version, "cuda", INFO["cuda_version"])
    (decision,) = kernels.variants.resolve_variants(
        kernels.variants.get_variants_local(repository / "build")
    )[1]
    assert isinstance(decision, kernels.VariantAccepted)


def test_the_metadata_are_those_that_kernels_reads(variant):
    metadata = Metadata.read_from_file(variant / "metadata.json")
    assert metadata.id == f"_rope_ext_{'cuda' if INFO['cuda'] else 'cpu'}_{metadata.id[-7:]}"
    assert (str(metadata.name), metadata.version) == ("rope-ext", 0)
    assert metadata.name.python_name == "rope_ext"
    assert str(metadata.kernels_minver) == kernels_folder.TESTED
    assert metadata.python_depends == metadata.kernel_depends == []
    assert metadata.backend.archs == (INFO["cuda_archs"] if INFO["cuda"] else None)
    text = Path(__file__).parents[2].joinpath("pyproject.toml").read_text()
    assert metadata.license == "apache-2.0"
    assert 'license = "Apache-2.0"' in text
    metadata.digest.validate(Digest.hash_variant(DigestAlgorithm.SHA256, variant))


def test_imports_are_relative_and_of_python_and_torch_alone(variant):
    for path in variant.rglob("*.py"):
        tree = ast.parse(path.read_text())
        inside = {n for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for n in ast.walk(f)}
        for node in ast.walk(tree):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module]
            allowed = {"torch", *sys.stdlib_module_names}
            if node in inside:  # what a function of the hooks needs
                allowed |= {"kernels", "transformers"}
            with naming(path.relative_to(variant)):
                assert {name.partition(".")[0] for name in names} <= allowed


def test_nothing_is_left_of_the_command_line_and_of_other_integrations(variant):
    names = {path.relative_to(variant).as_posix() for path in variant.rglob("*") if path.is_file()}
    left_out = [n for n in names if n.startswith(("demo", "viz", "__main__", "integrations/onnx"))]
    assert not left_out
    own = {path.relative_to(PACKAGE).as_posix() for path in PACKAGE.glob("*.py")}
    assert own - {"__main__.py"} | {"layers.py", "metadata.json", COMPILED, "py.typed"} <= names


# ---- as a kernel


ALONE = """
import sys, torch
from pathlib import Path
from kernels import get_local_kernel, get_kernel

kernel = get_local_kernel(Path({path!r}))
assert get_kernel("me/rope", version=0) is kernel  # by LOCAL_KERNELS
x, angle = torch.randn(2, 5, 3, 16, requires_grad=True), torch.randn(5, 8)
cos, sin = angle.cos(), angle.sin()
c, s, (x1, x2) = cos[:, None], sin[:, None], x.chunk(2, -1)
expected = torch.cat([x1 * c - x2 * s, x2 * c + x1 * s], -1)
rotate = torch.compile(kernel.apply_rotary, fullgraph=True, backend="aot_eager")
for function in (kernel.apply_rotary, rotate):
    y = function(x, cos, sin)
    assert torch.equal(y, expected)
    grad = torch.autograd.grad(y.square().sum(), x)[0]
    torch.testing.assert_close(grad, 2 * x.detach())  # a rotation keeps lengths
names = torch._C._dispatch_get_all_op_names()
assert any(name.startswith(kernel.__name__ + "::") for name in names)
assert not any(name.startswith("rope::") for name in names)
assert "rope_ext" not in sys.modules
print(kernel.__name__, kernel.layers.RotaryPosEmb.has_backward)
"""


def test_works_alone_in_a_process(location, variant, tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "LOCAL_KERNELS": f"me/rope={location}"}
    code = ALONE.format(path=str(location))
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        capture_output=True, text=True, cwd=tmp_path, env=environment,
    )  # fmt: skip
    name = Metadata.read_from_file(variant / "metadata.json").id
    assert result.stdout == f"{name} True\n", result.stderr


def test_runs_beside_rope_ext_and_beside_another_build(kernel, tmp_path):
    init = PACKAGE.joinpath("__init__.py").read_bytes() + b"\n# another build\n"
    other_variant = write([wheel_in(tmp_path, **{"__init__.py": init})], tmp_path)
    other = kernels.get_local_kernel(loadable(tmp_path, other_variant))
    assert len({kernel.__name__, other.__name__, "rope_ext"}) == 3
    assert Path(other.__file__).parent == other_variant
    assert other._C is not kernel._C is not rope_ext._C
    x, (cos, sin) = random(B, S, H, D), random_table(S, D // 2)
    expected = rope_ext.apply_rotary(x, cos, sin)
    for one in (kernel, other):
        got, calls = calls_of(one, lambda one=one: one.apply_rotary(x, cos, sin))
        assert calls == 1
        assert_same_bits(got, expected)
        with pytest.raises(RuntimeError, match="apply_rotary: expected sin"):
            one.apply_rotary(x, cos[:, :3], sin)
    leaf = x.requires_grad_()
    with torch.profiler.profile() as profile:  # a kernel's backward is its own
        kernel.apply_rotary(leaf, cos, sin).sum().backward()
    names = {e.key.partition("::")[0] for e in profile.key_averages() if "apply_rotary" in e.key}
    assert {n for n in names if "rope" in n} == {kernel.__name__}


# ---- as a layer


class Attention(torch.nn.Module):
    """A module with the hook of transformers, of a rotation in plain PyTorch."""

    def forward(self, q, k, cos, sin):
        return apply_rotary_pos_emb(q, k, cos, sin)


@kernels.use_kernel_forward_from_hub("rotary_pos_emb")
def apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=1):
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    half = q.shape[-1] // 2
    return tuple(x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin for x in (q, k))


kernels.use_kernelized_func(apply_rotary_pos_emb)(Attention)


def mapping(location, mode):
    layer = kernels.LocalLayerRepository(location, layer_name="RotaryPosEmb")
    return {"rotary_pos_emb": {"cpu": {mode: layer}}}


def inputs():
    return [random(B, H, S, D), random(B, 2, S, D), *random_table(1, S, D)]


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_the_layer_computes_and_learns_as_the_function_in_its_place(location, kernel, mode):
    model = Attention()
    expected = model(*inputs())
    with kernels.use_kernel_mapping(mapping(location, mode), inherit_mapping=False):
        kernels.kernelize(
            model, mode=mode, device="cpu", use_fallback=kernels.KernelizeFallback.NONE
        )
    try:
        if kernels.Mode.TORCH_COMPILE in mode:
            torch.compiler.reset()
            model.compile(fullgraph=True, backend="aot_eager")
            model(*inputs())
        results, calls = calls_of(kernel, lambda: model(*inputs()))
        assert calls == 1
        for got, own in zip(results, expected, strict=True):
            assert_same_bits(got, own)
        if kernels.Mode.TRAINING in mode:
            gradients = []
            for function in (
                model,
                type(apply_rotary_pos_emb).forward.__get__(apply_rotary_pos_emb),
            ):
                leaves = [x.requires_grad_() for x in inputs()]
                sum(x.square().sum() for x in function(*leaves)).backward()
                gradients.append([x.grad for x in leaves])
            torch.testing.assert_close(*gradients)
    finally:
        apply_rotary_pos_emb.__dict__.pop("forward", None)


@pytest.fixture
def transformers():
    hook = pytest.importorskip("transformers.models.llama.modeling_llama").apply_rotary_pos_emb
    if not hasattr(type(hook), "kernel_layer_name"):
        pytest.skip("kernels is not of the version that transformers takes")
    yield sys.modules["transformers"]
    hook.__dict__.pop("forward", None)


@pytest.mark.parametrize("mode", MODES[:2], ids=str)
def test_a_model_of_transformers_rotates_with_it(location, kernel, transformers, mode):
    model, tokens = (
        small_llama(2).train(kernels.Mode.TRAINING in mode),
        torch.arange(12).view(1, 12),
    )
    results = []
    for layer in ({}, mapping(location, mode)):
        with kernels.use_kernel_mapping(layer, inherit_mapping=False):
            kernels.kernelize(model, mode=mode, device="cpu")
        model.zero_grad()
        logits, calls = calls_of(kernel, lambda: model(tokens).logits)
        assert calls == (2 if layer else 0)
        logits.square().mean().backward()
        results.append([logits, *(p.grad for p in model.parameters())])
    # Float32, from the same rotation: the gradients' products may be summed in another order.
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-6)


# ---- the command


def test_wheels_of_several_pythons_share_a_folder_and_replace_what_was_there(tmp_path):
    build = tmp_path / "kernel/build"
    stale, other = build / VARIANT / "old/file.py", build / "torch-stable-abi210-xpu-x86_64-linux/x"
    for path in (stale, other):
        path.parent.mkdir(parents=True)
        path.touch()
    folder = write([wheel_in(tmp_path, python) for python in (PYTHON, "cp39")], tmp_path / "kernel")
    assert folder == build / VARIANT
    assert len(list(folder.glob("_C.*.so"))) == 2
    assert (stale.parent.exists(), other.exists()) == (False, True)


def test_wheels_that_do_not_go_together_are_refused(tmp_path, capsys):
    good = wheel_in(tmp_path)
    older, other_backend, broken, empty = (
        tmp_path / n for n in ("older", "cuda", "broken", "empty")
    )
    for folder in (older, other_backend, broken, empty):
        folder.mkdir()
    compiled = Path(rope_ext._C.__file__).read_bytes()
    swapped = (
        compiled.replace(b".nv_fatbin", b".nv_xxxxxx") if INFO["cuda"] else compiled + b".nv_fatbin"
    )
    raises = b"raise ImportError('not that torch')"
    foreign = shutil.copy(good, empty / WHEEL(PYTHON).replace(CPU, "riscv64"))
    with zipfile.ZipFile(empty / "other.whl", "w") as archive:
        archive.writestr("other/__init__.py", "")
    for expected, wheels in {
        "expected wheels of one version": [good, wheel_in(older, "cp39", **{"options.py": b""})],
        "all with CUDA kernels or all without": [
            good, wheel_in(other_backend, "cp39", **{COMPILED: swapped}),
        ],
        f"expected a wheel of {sys.implementation.cache_tag}": [wheel_in(empty, "cp39")],
        "expected wheels that can be imported, got .*: not that torch": [
            wheel_in(broken, **{"__init__.py": raises})
        ],
        "expected wheels of one platform": [foreign],
        "without its compiled part": [empty / "other.whl"],
        "No such file": [tmp_path / "missing.whl"],
    }.items():  # fmt: skip
        with naming(expected):
            assert main([*map(str, wheels), str(tmp_path / "out")]) == 2
            error = capsys.readouterr().err
            with pytest.raises(ValueError, match=expected):
                raise ValueError(error)
            assert error.startswith("python -m rope_ext.integrations.kernels_folder: expected")
            assert not (tmp_path / "out").exists()


def test_this_is_the_release_of_kernels_that_was_tested():
    assert kernels.__version__ == kernels_folder.TESTED
    text = Path(__file__).parents[2].joinpath("pyproject.toml").read_text()
    assert f'"kernels=={kernels_folder.TESTED}"' in text
