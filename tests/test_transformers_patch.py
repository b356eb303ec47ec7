"""patch(model): what it replaces, how it is undone, and that nothing else changes."""

import copy
import io

import pytest
import torch
from rotating_models import TOKENS, rotations_of_rope_ext
from torch import nn

transformers = pytest.importorskip("transformers", reason="pip install 'rope_ext[test]'")
from support import naming, small_llama  # noqa: E402
from torch.nn.functional import scaled_dot_product_attention  # noqa: E402
from transformers.models.llama import modeling_llama  # noqa: E402

import rope_ext  # noqa: E402
from rope_ext.integrations.transformers import patch, patched, unpatch  # noqa: E402
from rope_ext.integrations.transformers.loaded_models import substituted  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
LAYERS = 2
# Before torch 2.12 Dynamo does not notice that a module has got its own forward.
NOTICES_A_PATCH = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 12)
STANDARD = "half-split"


@pytest.fixture
def model():
    return small_llama(LAYERS)


# ---- replaced rotations


def test_every_layer_rotates_with_rope_ext_and_gives_the_same_logits(model):
    before = model(TOKENS).logits
    report = patch(model)
    assert torch.equal(model(TOKENS).logits, before)
    assert rotations_of_rope_ext(model, TOKENS) == LAYERS
    assert report.modules == tuple(f"model.layers.{i}.self_attn" for i in range(LAYERS))
    assert report.conventions == (STANDARD,)
    assert {(s.method, s.function) for s in report.sites} == {("forward", "apply_rotary_pos_emb")}
    assert "half-split: forward -> apply_rotary_pos_emb (2, " in str(report)


def test_another_model_of_the_family_is_not_affected(model):
    other = copy.deepcopy(model)
    function = modeling_llama.apply_rotary_pos_emb
    patch(model)
    assert rotations_of_rope_ext(other, TOKENS) == 0
    assert modeling_llama.apply_rotary_pos_emb is function
    assert type(other.model.layers[0].self_attn) is modeling_llama.LlamaAttention


def test_a_model_of_which_a_part_was_patched_is_patched_as_a_whole(model):
    assert patch(model.model.layers[1]).modules == ("self_attn",)
    assert rotations_of_rope_ext(model, TOKENS) == 1
    with patched(model) as report:
        assert len(report.sites) == rotations_of_rope_ext(model, TOKENS) == LAYERS
    assert rotations_of_rope_ext(model, TOKENS) == 1


class ExactTables(nn.Module):
    """Replaces a model's rotary_emb."""

    def __init__(self, config):
        super().__init__()
        self.rotary = rope_ext.RotaryEmbedding.from_config(config)

    def forward(self, x, position_ids):
        cos, sin = self.rotary.cos_sin(position_ids)
        return torch.cat((cos, cos), -1), torch.cat((sin, sin), -1)


def test_a_model_that_holds_modules_of_rope_ext_is_patched(model):
    before = model(TOKENS).logits
    model.model.rotary_emb = ExactTables(model.config)
    assert len(patch(model).sites) == LAYERS
    # Its own tables round angles below 40 radians by up to 2^-19.
    torch.testing.assert_close(model(TOKENS).logits, before, rtol=0, atol=2**-12)
    assert rotations_of_rope_ext(model, TOKENS) == LAYERS + 1  # and the rows of the table


def test_modules_keep_the_names_and_bases_of_their_classes(model):
    patch(model)
    attention = model.model.layers[0].self_attn
    assert isinstance(attention, modeling_llama.LlamaAttention)
    named = (type(attention).__name__, type(attention).__module__)
    assert named == ("LlamaAttention", modeling_llama.__name__)
    assert repr(attention).startswith("LlamaAttention(")


def test_globals_of_a_patched_method_are_looked_up_when_it_runs(model, monkeypatch):
    patch(model)
    calls = []

    def attention(module, q, k, v, mask, **options):
        calls.append(module)
        out = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return out.transpose(1, 2), None

    monkeypatch.setattr(modeling_llama, "eager_attention_forward", attention)
    model.set_attn_implementation("eager")
    model(TOKENS)
    assert len(calls) == LAYERS


def test_a_model_that_was_compiled_earlier_compiles_again(model):
    graphs = []

    def count(graph, inputs):
        graphs.append(sum("rope" in str(node.target) for node in graph.graph.nodes))
        return graph

    compiled = torch.compile(model, backend=count, fullgraph=True)
    with torch.no_grad():
        own = compiled(TOKENS, use_cache=False).logits
        with patched(model):
            if not NOTICES_A_PATCH:
                torch.compiler.reset()
            assert torch.equal(compiled(TOKENS, use_cache=False).logits, own)
        assert torch.equal(compiled(TOKENS, use_cache=False).logits, own)
    assert graphs == [0, LAYERS]


# ---- undone


def test_unpatch_brings_back_the_models_own_functions(model):
    before = dict(vars(model.model.layers[0].self_attn))
    unpatch(model)  # does nothing
    patch(model)
    assert patch(model) == patch(model)
    with patched(model):
        pass
    assert rotations_of_rope_ext(model, TOKENS) == LAYERS
    unpatch(model)
    assert vars(model.model.layers[0].self_attn) == before
    assert rotations_of_rope_ext(model, TOKENS) == 0


def test_blocks_undo_their_own_patch_alone_even_after_an_error(model):
    def fail_inside(part):
        with patched(model) as report:
            assert len(report.sites) == rotations_of_rope_ext(model, TOKENS) == LAYERS
            if part:
                patch(part)
            raise ZeroDivisionError

    for part, stays in ((None, 0), (model.model.layers[0], 1)):
        with pytest.raises(ZeroDivisionError):
            fail_inside(part)
        assert rotations_of_rope_ext(model, TOKENS) == stays
    with patched(model), patched(model):
        patch(model)
    assert rotations_of_rope_ext(model, TOKENS) == LAYERS


# Blocks for the model and for its first layer, in the order in which they are entered and left.
BLOCKS = [(0, 0, 0), (0, 0, 1), (0, 1, 0), (0, 1, 1), (1, 0, 0), (1, 0, 1)]


def test_of_two_blocks_the_last_to_leave_unpatches(model):
    parts = [(model, LAYERS), (model.model.layers[0], 1)]
    for first, second, leaves in BLOCKS:
        entered = [parts[first], parts[second]]
        blocks = [patched(part) for part, _ in entered]
        with naming((first, second, leaves)):
            for block in blocks:
                block.__enter__()
            assert rotations_of_rope_ext(model, TOKENS) == max(rotate for _, rotate in entered)
            blocks[leaves].__exit__(None, None, None)
            assert rotations_of_rope_ext(model, TOKENS) == entered[1 - leaves][1]
            blocks[1 - leaves].__exit__(None, None, None)
            assert rotations_of_rope_ext(model, TOKENS) == 0


def test_a_block_does_not_undo_what_came_after_an_unpatch_in_it(model):
    block = patched(model)
    with block:
        unpatch(model)
        assert rotations_of_rope_ext(model, TOKENS) == 0
        later = patched(model)
        later.__enter__()
    assert rotations_of_rope_ext(model, TOKENS) == LAYERS
    later.__exit__(None, None, None)
    assert rotations_of_rope_ext(model, TOKENS) == 0


def test_a_block_of_other_rotations_does_not_mix_with_a_patch(model):
    with substituted(model, lambda function, rotation: function):
        with pytest.raises(RuntimeError, match="patch outside of that"):
            patch(model)
        assert rotations_of_rope_ext(model, TOKENS) == 0
    assert type(model.model.layers[0].self_attn) is modeling_llama.LlamaAttention
    patch(model.model.layers[1])
    with pytest.raises(RuntimeError, match=r"'model\.layers\.1\.self_attn'"):
        substituted(model, lambda function, rotation: function).__enter__()
    assert rotations_of_rope_ext(model, TOKENS) == 1


def test_a_copy_of_a_patched_model_is_patched_by_itself(model):
    patch(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.model.layers[0].self_attn.q_proj.weight.zero_()
    assert not torch.equal(twin(TOKENS).logits, model(TOKENS).logits)
    unpatch(model)
    assert rotations_of_rope_ext(twin, TOKENS) == LAYERS
    unpatch(twin)
    assert rotations_of_rope_ext(twin, TOKENS) == 0


def test_a_shallow_copy_uses_its_own_weights(model):
    patch(model)
    attention = model.model.layers[0].self_attn
    for copied in (copy.copy, nn.Module._replicate_for_data_parallel):
        assert copied(attention).forward.__self__ is not attention


def test_a_patched_model_is_saved_as_one_that_needs_no_rope_ext(model):
    patch(model)
    file = io.BytesIO()
    torch.save(model, file)
    assert b"rope_ext" not in file.getvalue()
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert torch.equal(loaded(TOKENS).logits, model(TOKENS).logits)
    assert rotations_of_rope_ext(loaded, TOKENS) == 0
    patch(loaded)
    assert rotations_of_rope_ext(loaded, TOKENS) == LAYERS


@pytest.mark.parametrize("first", ["hook", "patch"])
def test_hooks_of_accelerate_stay_before_and_after_a_patch(first, model):
    hooks = pytest.importorskip("accelerate.hooks")

    class CountCalls(hooks.ModelHook):
        calls = 0

        def pre_forward(self, module, *args, **kwargs):
            self.calls += 1
            return args, kwargs

    attention = model.model.layers[0].self_attn
    hook = CountCalls()
    if first == "patch":
        patch(model)
    hooks.add_hook_to_module(attention, hook)
    for calls in (2, 2):  # the second time the hook's saved forward is left on the module
        assert len(patch(model).sites) == LAYERS
        assert rotations_of_rope_ext(model, TOKENS) == LAYERS
        unpatch(model)
        assert rotations_of_rope_ext(model, TOKENS) == 0
        assert hook.calls == calls
        if getattr(attention, "_hf_hook", None):
            hooks.remove_hook_from_module(attention)
