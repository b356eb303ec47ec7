"""timm's models with their rotation replaced, against timm itself."""

import copy

import pytest
import torch
from support import assert_same_bits, naming, random, random_table

pytest.importorskip("timm")

import timm
from timm.layers import AttentionRope, RotAttentionPool2d, create_feature_extractor
from timm.layers import apply_rot_embed_cat as rotate_cat
from timm.layers import pos_embed_sincos as sincos
from timm.models.deepseek_vit import DeepseekVitClassifier
from timm.models.vision_transformer_sam import VisionTransformerSAM

from rope_ext.integrations import timm as integration
from rope_ext.integrations.timm import apply_rot_embed, patch, patched, unpatch

OWN = sincos.apply_rot_embed
B, H, S, D = 2, 3, 5, 16
TINY = {"patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 3}


# ---- the function


# Rows of sin and cos: where they come from.
ROWS = {
    (S, D): "one grid",
    (H, S, D): "RotaryEmbeddingMixed, one block",
    (B, S, D): "images of a NaFlex batch, x [B, S, D]",
    (B, 1, S, D): "images of a NaFlex batch",
    (1, H, S, D): "RotaryEmbeddingMixed with a batch of 1",
    (B, H, S, D): "RotaryEmbeddingMixed, each image with other patches",
}


def x_for(rows, dtype=torch.float32):
    """Queries as a packed projection gives them, without a prefix token."""
    if rows == (B, S, D):
        return random(B, S + 1, 3, D, dtype=dtype)[:, 1:, 1]
    return random(B, S + 1, 3, H, D, dtype=dtype).permute(2, 0, 3, 1, 4)[1][:, :, 1:]


def leaves(*tensors):
    return [x.detach().clone().requires_grad_() for x in tensors]


@pytest.mark.parametrize("half", [False, True], ids=["neighbours", "halves"])
@pytest.mark.parametrize("rows", ROWS, ids=str)
def test_rotates_and_learns_as_timm(rows, half):
    x, (cos, sin) = x_for(rows), random_table(*rows)
    assert_same_bits(apply_rot_embed(x, sin, cos, half), OWN(x, sin, cos, half))
    gradients = []
    for function in (apply_rot_embed, OWN):
        inputs = leaves(x, sin, cos)
        function(*inputs, half).square().sum().backward()
        gradients.append([t.grad for t in inputs])
    # Sums of up to B H terms, each with three roundings: gradients are within 20.
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", ROWS, ids=str)
def test_half_precision_has_timms_bits_with_float32_tables_and_is_closer_without(rows, dtype):
    x, (cos, sin) = x_for(rows, dtype), random_table(*rows)
    assert_same_bits(apply_rot_embed(x, sin, cos), OWN(x, sin, cos))
    cos, sin = cos.to(dtype), sin.to(dtype)
    exact = OWN(x.double(), sin.double(), cos.double())
    error, own = ((f(x, sin, cos).double() - exact).abs() for f in (apply_rot_embed, OWN))
    # One rounding to dtype, after three to float32; timm rounds to dtype three times.
    eps = torch.finfo(dtype).eps
    assert (error <= eps / 2 * exact.abs() + 1e-6).all()
    assert own.max() > error.max()


def test_second_gradients_are_those_of_timm():
    x, (cos, sin) = random(2, 2, 2, 4).double(), random_table(2, 2, 4, dtype=torch.float64)
    assert torch.autograd.gradgradcheck(apply_rot_embed, leaves(x, sin, cos))


def test_channels_that_are_not_adjacent_are_rotated():
    x, (cos, sin) = random(B, D, S).transpose(1, 2), random_table(S, D)
    assert_same_bits(apply_rot_embed(x, sin, cos), OWN(x, sin, cos))
    cos, sin = (t.T.contiguous().T for t in (cos, sin))
    assert_same_bits(apply_rot_embed(x, sin, cos), OWN(x, sin, cos))


def test_no_images_and_no_tokens_give_nothing():
    for rows, shape in (((H, S, D), (0, H, S, D)), ((0, D), (B, H, 0, D)), ((0, H, S, D),) * 2):
        with naming((rows, shape)):
            assert apply_rot_embed(random(*shape), *random_table(*rows)).shape == shape


def test_other_shapes_are_refused_by_name():
    x = random(B, H, S, D)
    table = (
        "{} to have shape [S, D], [1|H, S, D] or [1|B, 1|H, S, D] of x [2, 3, 5, 16], got shape {}"
    )
    for expected, args in {
        "x to have shape [S, D], [H, S, D] or [B, H, S, D], got shape [1, 2, 3, 5, 16]": (
            x[None], *random_table(S, D),
        ),
        "x to be a Tensor, got None": (None, *random_table(S, D)),
        table.format("sin_emb", "[4, 16]"): (x, *random_table(S - 1, D)),
        table.format("sin_emb", "[5, 8]"): (x, *random_table(S, D // 2)),
        table.format("sin_emb", "[2, 5, 16]"): (x, *random_table(B, S, D)),
        table.format("sin_emb", "[1, 1, 1, 5, 16]"): (x, *random_table(1, 1, 1, S, D)),
        table.format("cos_emb", "[16]"): (x, random(S, D), random(D)),
        "cos_emb to have the shape of sin_emb, [5, 16], got shape [3, 5, 16]": (
            x, random(S, D), random(H, S, D),
        ),
    }.items():  # fmt: skip
        with naming(expected), pytest.raises((ValueError, TypeError)) as refusal:
            apply_rot_embed(*args)
        assert str(refusal.value) == f"rope_ext timm.apply_rot_embed: expected {expected}"


# ---- models


@pytest.fixture(autouse=True)
def as_it_was():
    yield
    unpatch()
    assert sincos.apply_rot_embed is OWN


def model_of(name, **options):
    torch.manual_seed(0)
    return timm.create_model(name, **TINY, **options)


def images():
    return random(2, 3, 32, 32)


def naflex():
    """Two images of 4 x 4 and 3 x 4 patches, padded to 16."""
    grids = [torch.cartesian_prod(torch.arange(h), torch.arange(w)) for h, w in ((4, 4), (3, 4))]
    coordinates, valid = torch.zeros(2, 16, 2, dtype=torch.long), torch.zeros(2, 16).bool()
    for i, grid in enumerate(grids):
        coordinates[i, : len(grid)], valid[i, : len(grid)] = grid, True
    patches = random(2, 16, 8 * 8 * 3)
    return {"patches": patches, "patch_coord": coordinates, "patch_valid": valid}


def sam():
    torch.manual_seed(0)
    # A window of 2 x 2 patches, then all of them.
    return VisionTransformerSAM(
        img_size=32,
        **TINY,
        use_rope=True,
        use_rel_pos=False,
        window_size=2,
        global_attn_indexes=(1,),
    )


def deepseek():
    torch.manual_seed(0)
    return DeepseekVitClassifier(img_size=32, **TINY)


class Pool(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.pool = RotAttentionPool2d(48, num_heads=3, ref_feat_size=4, out_features=3)

    def forward(self, x):
        return self.pool(x.reshape(2, 48, 8, 8))


# The model, its input, rotations of a forward pass: of q and of k in each block.
MODELS = {
    "EVA-02": (lambda: model_of("eva02_tiny_patch14_224", img_size=32), images, 4),
    "DINOv3, halves and 5 prefix tokens": (
        lambda: model_of("vit_small_patch16_dinov3", img_size=32), images, 4,
    ),
    "ViT-RoPE": (lambda: model_of("vit_small_patch16_rope_224", img_size=32), images, 4),
    "ViT-RoPE, rows for each head": (
        lambda: model_of("vit_small_patch16_rope_mixed_224", img_size=32), images, 4,
    ),
    "ViT-RoPE, other patches in each image": (
        lambda: model_of("vit_small_patch16_rope_224", img_size=32, patch_drop_rate=0.25),
        images, 4,
    ),
    "ViT-RoPE, rows for each head and image": (
        lambda: model_of("vit_small_patch16_rope_mixed_224", img_size=32, patch_drop_rate=0.25),
        images, 4,
    ),
    "NaFlexViT": (
        lambda: model_of("naflexvit_base_patch16_gap", rope_type="axial"), naflex, 4,
    ),
    "NaFlexViT, rows for each head and image": (
        lambda: model_of("naflexvit_base_patch16_gap", rope_type="mixed"), naflex, 4,
    ),
    "AttentionRope of DeepSeek's encoder": (deepseek, images, 4),
    "SAM, x [B H, S, D]": (sam, images, 4),
    "pooling of attention": (Pool, images, 2),
}  # fmt: skip


@pytest.fixture(params=MODELS)
def case(request):
    make, inputs, rotations = MODELS[request.param]
    return make().train(), inputs(), rotations


def calls_of_the_operators(function):
    with torch.profiler.profile() as profile:
        function()
    return sum(e.count for e in profile.key_averages() if e.key.startswith("rope::"))


def result_of(model, x):
    torch.manual_seed(0)  # for the patches that are dropped
    y = model(x)
    return y[0] if isinstance(y, (list, tuple)) else y


def result_and_gradients(model, x):
    model.zero_grad()
    y = result_of(model, x)
    y.float().square().sum().backward()
    return y.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def test_a_model_computes_and_learns_the_same(case):
    model, x, rotations = case
    expected, gradients = result_and_gradients(model, x)
    assert calls_of_the_operators(lambda: result_of(model, x)) == 0
    patch()  # the model exists already
    got, learned = result_and_gradients(model, x)
    assert calls_of_the_operators(lambda: result_of(model, x)) == rotations
    assert_same_bits(got, expected)
    assert learned.keys() == gradients.keys()
    for name, gradient in gradients.items():
        # Gradients of rows are summed in another order.
        atol = 1e-5 * float(gradient.abs().max())
        torch.testing.assert_close(learned[name], gradient, rtol=1e-4, atol=atol, msg=name)
    unpatch()
    assert calls_of_the_operators(lambda: result_of(model, x)) == 0


def test_a_bfloat16_model_is_as_close_to_float32_as_with_timms_rotation(case):
    model, x, rotations = case
    low = copy.deepcopy(model).bfloat16()
    x_low = {**x, "patches": x["patches"].bfloat16()} if isinstance(x, dict) else x.bfloat16()
    exact, gradients = result_and_gradients(model, x)
    own, own_gradients = result_and_gradients(low, x_low)
    with patched():
        got, got_gradients = result_and_gradients(low, x_low)
        assert calls_of_the_operators(lambda: result_of(low, x_low)) == rotations
    assert got.dtype == own.dtype == torch.bfloat16
    # The error of timm's own bfloat16, twice, and an eps for a value that it happens to hit.
    eps = torch.finfo(torch.bfloat16).eps
    pairs = {"result": (got, own, exact)}
    pairs |= {n: (got_gradients[n], own_gradients[n], g) for n, g in gradients.items()}
    for name, (x, y, z) in pairs.items():
        error, allowed = (x.float() - z).norm(), 2 * (y.float() - z).norm() + eps * z.norm()
        assert error <= allowed, (name, error, allowed)


@pytest.mark.parametrize("kind", ["base", "cat", "mixed", "dinov3"])
def test_rotary_modules_rotate_feature_maps_as_before(kind):
    options = {"depth": 2} if kind == "mixed" else {}
    rope = sincos.create_rope_embed(kind, dim=48, num_heads=3, **options)
    x = random(2, 48 if kind == "mixed" else 16, 4, 5)
    expected = rope(x)
    patch()
    assert_same_bits(rope(x), expected)
    assert calls_of_the_operators(lambda: rope(x)) == 1


def test_mixed_frequencies_are_learned():
    model = MODELS["ViT-RoPE, rows for each head"][0]()
    with patched():
        _, gradients = result_and_gradients(model, images())
    assert gradients["rope.freqs"].abs().max() > 0


# ---- what else models go through


def attention():
    torch.manual_seed(0)
    x, (cos, sin) = random(2, 6, 48), random_table(3, 5, 16)
    module = AttentionRope(48, num_heads=3, num_prefix_tokens=1).eval()
    return module, (x, torch.cat([sin, cos], -1))


def test_compiles_to_one_graph_with_the_operators_in_it():
    module, inputs = attention()
    expected, graphs = module(*inputs), []
    torch.compiler.reset()
    compiled = torch.compile(module, fullgraph=True, backend=lambda g, _: graphs.append(g) or g)
    compiled(*inputs)
    patch()
    assert_same_bits(compiled(*inputs), expected)
    called = [[str(node.target) for node in graph.graph.nodes] for graph in graphs]
    assert [sum("rope.apply_rotary" in name for name in names) for names in called] == [0, 2]


def test_exports_with_the_operators():
    module, inputs = attention()
    expected = module(*inputs)
    patch()
    program = torch.export.export(module, inputs)
    assert sum("rope.apply_rotary" in str(n.target) for n in program.graph.nodes) == 2
    assert_same_bits(program.module()(*inputs), expected)


def test_a_traced_model_keeps_timms_arithmetic():
    model = MODELS["ViT-RoPE, rows for each head"][0]().eval()
    expected = model.forward_features(images())
    patch()
    traced = create_feature_extractor(model, {"norm": "y"})
    assert_same_bits(traced(images())["y"], expected)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_torch_jit_script_says_what_to_do():
    with patched(), pytest.raises(RuntimeError, match=r"patched by rope_ext: unpatch\(\)"):
        torch.jit.script(rotate_cat)
    torch.jit.script(rotate_cat)


# ---- on and off


def test_patch_twice_and_unpatch_once():
    patch()
    replaced = sincos.apply_rot_embed
    patch()
    assert sincos.apply_rot_embed is timm.layers.apply_rot_embed is replaced is not OWN
    with patched():
        pass
    assert sincos.apply_rot_embed is replaced
    unpatch()
    unpatch()
    assert sincos.apply_rot_embed is timm.layers.apply_rot_embed is OWN


def another_rotation(x, sin_emb, cos_emb, half=False):
    return OWN(x, -sin_emb, cos_emb, half)


def another_signature(x, cos_emb, sin_emb, half=False):
    return OWN(x, sin_emb, cos_emb, half)


@pytest.mark.parametrize(
    "function", [another_rotation, another_signature, None], ids=["rotation", "signature", "none"]
)
def test_a_timm_that_rotates_otherwise_is_refused(function, monkeypatch):
    monkeypatch.setattr(sincos, "apply_rot_embed", function)
    releases = rf"as timm {integration.TESTED}, got timm {timm.__version__}"
    with pytest.raises(RuntimeError, match=releases):
        patch()
    assert sincos.apply_rot_embed is function
    monkeypatch.undo()


def test_a_timm_whose_models_do_not_call_the_function_is_refused(monkeypatch):
    monkeypatch.setattr(timm.layers, "apply_rot_embed_cat", lambda x, emb, half=False: x)
    with pytest.raises(RuntimeError, match="expected a timm whose apply_rot_embed_cat calls"):
        patch()
    assert sincos.apply_rot_embed is OWN


def test_this_is_the_release_that_was_tested():
    assert timm.__version__ == integration.TESTED
