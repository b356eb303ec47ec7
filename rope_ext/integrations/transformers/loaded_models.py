"""patch(model) replaces the rotation of one loaded model of transformers."""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

from torch import nn

from rope_ext._argument_errors import describe, shown
from rope_ext.integrations.patching import models
from rope_ext.integrations.patching.library import Library, Tables
from rope_ext.integrations.patching.method_copies import Substitute
from rope_ext.integrations.patching.models import Report
from rope_ext.integrations.transformers import table_recognition
from rope_ext.integrations.transformers.forms import recognize, recognize_method
from rope_ext.integrations.transformers.tables import ExactTables, table_methods


def patch(model: nn.Module, *, tables: bool = False) -> Report:
    """Replaces the rotation of queries and keys of a loaded transformers model by rope_ext's.

    Only this model changes; its parameters, tables of cos and sin, cache and outputs keep their
    form. A patched model trains, generates, compiles and is copied as before. A model that was
    compiled earlier compiles again (before torch 2.12 it keeps its old rotation until
    torch.compiler.reset()). A model that is saved as a whole and loaded again is unpatched. The
    result has q's dtype, also where the model's own function would return float32 for a bfloat16 q
    because its tables are float32.

    Each rotation is recognized by the names of its parameters and by its results for a few numbers,
    never by the model's name: see forms.py. The model's own function is called only for that.
    Afterwards its side effects, such as counting its calls, are missing.

    Args:
        model: any module that holds transformers' attention modules, such as a model, or one layer.
        tables: also replace the forward of the model's rotary modules, which make cos and sin. They
            become those of the exact angles, in float32 for every dtype of the model but float64,
            without waiting for the values of position_ids. inv_freq has the values of the config in
            float32, also after ``.half()`` and to_empty(). So results change where the model's own
            tables are inexact. See table_recognition.py.

    Returns:
        All rotations that are replaced now, including those of earlier calls.

    Raises:
        UnrecognizedRotation: if the model has no rotation, or one that is not recognized. Nothing
            has been changed then.
        TypeError: unless model is a module: for the name of a model, its class, its config.
    """
    return models.patch(_TRANSFORMERS, model, tables)


def unpatch(model: nn.Module) -> None:
    """Undoes :func:`patch` and :func:`patched` for a model, or any part of one.

    Modules that are not patched stay as they are.
    """
    models.unpatch(_TRANSFORMERS, model)


def patched(model: nn.Module, *, tables: bool = False) -> AbstractContextManager[Report]:
    """A model that is patched within a ``with`` block. The block gets the report.

    Afterwards each module is unpatched, unless :func:`patch` was called for it or another such
    block, of a part or of the whole model, still contains it.
    """
    return models.patched(_TRANSFORMERS, model, tables)


def substituted(model: nn.Module, substitute: Substitute) -> AbstractContextManager[None]:
    """A model that rotates by other functions within a ``with`` block."""
    return models.substituted(_TRANSFORMERS, model, substitute)


def _modules(function: str, model: Any) -> Iterator[tuple[str, nn.Module]]:
    _check_is_loaded(function, model)
    return model.named_modules()


def _check_is_loaded(function: str, model: Any) -> None:
    """Raises for what a model is made from: a name, a path, a class, a config, weights."""
    if isinstance(model, nn.Module):
        return
    loaded = "AutoModelForCausalLM.from_pretrained(...)"
    if isinstance(model, (str, os.PathLike)):
        loaded = f"AutoModelForCausalLM.from_pretrained({shown(os.fspath(model))})"
    elif isinstance(model, type) and issubclass(model, nn.Module):
        loaded = f"{model.__name__}.from_pretrained(...)"
    elif hasattr(model, "model_type"):
        loaded = "AutoModelForCausalLM.from_config(config)"
    raise TypeError(
        f"{function}: expected model to be a loaded model, got {describe(model)}: {loaded} makes "
        "one"
    )


_TABLES = Tables(
    table_recognition.makes_tables, table_recognition.recognize, ExactTables, table_methods
)
_TRANSFORMERS = Library(_modules, lambda function: True, recognize, recognize_method, _TABLES)
