"""Tiny random models of every family in transformers that rotates: nothing is downloaded.

A configuration is the family's default with small common sizes (`SIZES`); further settings of a
family are a row with its reason in tiny_families.py. The weights are random with a larger spread:
as transformers initialises them, all scores of a tiny model are near zero, and a wrong rotation
would not be noticed.
"""

import dataclasses
import importlib
import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType, ModuleType

import torch
import transformers
from tiny_inputs import SPECIAL, tokens
from torch import nn
from transformers import PreTrainedConfig

ROTATION = re.compile(r"_?apply_(\w+_)?(rotary|rope)\w*|\w+_rope|\w+_apply_rotary_emb|rotate_\w+")
VOCAB = 128

# Values of configuration fields, by name: four heads of 16 channels, two heads of keys.
SIZES = {
    64: "d_model embed_dim encoder_hidden_size hidden_size n_embd out_hidden_size output_dim "
    "projection_dim text_hidden_size vision_output_dim",
    48: "decoder_ffn_dim dense_intermediate_size encoder_ffn_dim expert_ffn_hidden_size ffn_dim "
    "ffn_hidden_size hidden_size_per_layer_input intermediate_size intermediate_size_mlp "
    "mlp_dim moe_intermediate_size share_expert_dim shared_expert_intermediate_size "
    "speech_encoder_intermediate_size",
    32: "image_size index_head_dim kv_lora_rank o_lora_rank projector_hidden_size q_lora_rank",
    16: "attention_head_dim head_dim kv_channels linear_key_head_dim linear_value_head_dim "
    "mamba_chunk_size mamba_d_state num_mel_bins qk_nope_head_dim qk_rope_head_dim v_head_dim",
    8: "index_topk mamba_n_heads patch_size sliding_window",
    4: "decoder_attention_heads encoder_attention_heads index_n_heads linear_num_value_heads "
    "moe_num_experts n_head n_heads n_routed_experts num_attention_heads num_experts "
    "num_heads num_local_experts num_sliding_attention_heads speech_encoder_attention_heads",
    2: "decoder_layers depth encoder_layers linear_num_key_heads moe_k moe_topk n_layer n_layers "
    "num_experts_per_tok num_hidden_layers num_key_value_heads num_kv_heads num_layers "
    "speech_encoder_layers temporal_patch_size",
    1: "first_k_dense_replace n_group n_shared_experts num_shared_experts topk_group",
}
FIELDS = {name: size for size, names in SIZES.items() for name in names.split()}
TOKEN = re.compile(r"\w+_token_(id|index)")
ENDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


@dataclasses.dataclass(frozen=True)
class Case:
    """One model to test, of one family."""

    family: str
    model: str = ""  # the class; by default the family's language model
    config: dict = dataclasses.field(default_factory=dict)  # in addition to SIZES
    inputs: Callable = tokens  # model -> arguments of forward
    variant: str = ""  # distinguishes the family's other cases
    generates: bool = True  # False if generate() needs more than tokens
    float64: bool = True  # False if a layer requires float32

    @property
    def name(self) -> str:
        """The family, with the model and variant if it is not the family's language model."""
        part = self.variant or self.model
        return f"{self.family} ({part})" if part else self.family

    @property
    def model_class(self) -> type[nn.Module]:
        if self.model:
            return getattr(modeling(self.family), self.model)
        for ending in ("ForCausalLM", "ForConditionalGeneration", "ForMaskedLM", "Model"):
            for name, value in vars(modeling(self.family)).items():
                own = getattr(value, "__module__", None) == modeling(self.family).__name__
                if own and name.endswith(ending) and not re.search("PreTrained|Vision|Audio", name):
                    return value
        raise LookupError(f"{self.family}: no language model found, name one in tiny_families.py")


def families() -> dict[str, list[str]]:
    """Families with a rotation, each with the names of the functions and methods for it."""
    found = {}
    for file in sorted(Path(transformers.__file__).parent.glob("models/*/modeling_*.py")):
        names = dict.fromkeys(re.findall(r"^ *def (\w+)\(", file.read_text(), re.MULTILINE))
        if names := [name for name in names if ROTATION.fullmatch(name)]:
            found[file.parent.name] = names
    return found


def modeling(family: str) -> ModuleType:
    return importlib.import_module(f"transformers.models.{family}.modeling_{family}")


def rotations(family: str) -> dict[CodeType, str]:
    """The code and the name of each function and method of a family that rotates."""
    module = modeling(family)
    owners = [module, *(owner for owner in vars(module).values() if inspect.isclass(owner))]
    return {
        inspect.unwrap(getattr(owner, name)).__code__: name
        for owner in owners
        if owner is module or owner.__module__ == module.__name__
        for name in vars(owner)
        if ROTATION.fullmatch(name)
    }


def innermost(codes: dict[CodeType, str]) -> dict[CodeType, str]:
    """The functions that call no other of them: those that rotate."""
    return {code: name for code, name in codes.items() if not {*codes.values()} & {*code.co_names}}


def tiny_config(config_class, overrides=None, special=None) -> PreTrainedConfig:
    overrides, small = dict(overrides or {}), dict(ENDS)
    special = special or iter(range(SPECIAL, VOCAB))
    default = config_class()
    for name, value in vars(default).items():
        if isinstance(value, PreTrainedConfig):
            # a dictionary, as in a file: some releases take nothing else
            small[name] = tiny_config(type(value), overrides.pop(name, None), special).to_dict()
        elif TOKEN.fullmatch(name) and value is not None:
            small[name] = next(special)
        elif "vocab_size" in name and value:
            small[name] = VOCAB
        elif name in FIELDS and type(value) is int:
            small[name] = min(value, FIELDS[name])
        elif "dropout" in name and type(value) is float:
            small[name] = 0.0
    if types := vars(default).get("layer_types"):  # a layer of each kind, at least two
        small["layer_types"] = [*dict.fromkeys(types)] if len({*types}) > 1 else types[:2]
        small["num_hidden_layers"] = len(small["layer_types"])
    if "kv_lora_rank" in small:  # latent attention has equal numbers of key and query heads
        small["num_key_value_heads"] = small["num_attention_heads"]
    return config_class(**{**small, **overrides})


def build(case: Case) -> nn.Module:
    """The model of a case, in float32, without dropout."""
    model_class = case.model_class
    torch.manual_seed(0)
    if getattr(model_class, "config_class", None):
        config = tiny_config(model_class.config_class, case.config)
        model = model_class._from_config(config, experts_implementation="eager")
    else:  # a part of a model that is hard to reach from its inputs
        config_class = inspect.signature(model_class).parameters["config"].annotation
        model = model_class(tiny_config(config_class, case.config))
    model.eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1 and parameter.numel():
                parameter.normal_(std=parameter[0].numel() ** -0.5)
            else:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    if getattr(model, "generation_config", None):
        model.generation_config.eos_token_id = None
    return model


def inputs(case: Case, model: nn.Module) -> dict:
    torch.manual_seed(2)
    return case.inputs(model)


def floats(output) -> Iterator[torch.Tensor]:
    """The floating-point tensors of a model's output, without its cache."""
    if isinstance(output, torch.Tensor):
        if output.is_floating_point():
            yield output
        return
    if isinstance(output, dict):
        output = [x for n, x in output.items() if "cache" not in n and n != "past_key_values"]
    if isinstance(output, (tuple, list)):
        for value in output:
            yield from floats(value)
