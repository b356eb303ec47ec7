"""patch(pipeline) and patch(model) replace the rotations of loaded diffusers models."""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

from torch import nn

from rope_ext._argument_errors import describe
from rope_ext.integrations.diffusers.forms import may_rotate, recognize
from rope_ext.integrations.patching import models
from rope_ext.integrations.patching.library import Library
from rope_ext.integrations.patching.models import Report


def patch(model: Any) -> Report:
    """Replaces the rotations of queries and keys of a pipeline or of a model by rope_ext's.

    Only this pipeline or model changes; its parameters, its tables of cos and sin and its outputs
    keep their form. A patched model trains, compiles and is copied as before. A model that is saved
    as a whole and loaded again is unpatched. Processors that are set afterwards, as by
    ``set_attn_processor``, are not patched: patch again.

    Each rotation is recognized by its results for a few numbers, never by the name of a model or of
    a parameter: see forms.py. The model's own function is called only for that.

    Args:
        model: a pipeline, of which each diffusers model that rotates is patched, or any module that
            holds diffusers' attention modules, such as a transformer, or one block.

    Returns:
        All rotations that are replaced now, including those of earlier calls.

    Raises:
        UnrecognizedRotation: if the model has no rotation, or one that is not recognized. Nothing
            has been changed then.
        TypeError: unless model is a pipeline or a module: for a name, a class, a config.
    """
    return models.patch(_DIFFUSERS, model)


def unpatch(model: Any) -> None:
    """Undoes :func:`patch` and :func:`patched` for a pipeline, a model, or any part of one.

    Modules that are not patched stay as they are.
    """
    models.unpatch(_DIFFUSERS, model)


def patched(model: Any) -> AbstractContextManager[Report]:
    """A pipeline or model that is patched within a ``with`` block. The block gets the report.

    Afterwards each module is unpatched, unless :func:`patch` was called for it or another such
    block, of a part or of the whole, still contains it.
    """
    return models.patched(_DIFFUSERS, model)


def _parts(function: str, model: Any) -> Iterator[tuple[str, Any]]:
    """The modules of a model or of a pipeline's models, and the processors of attention."""
    if isinstance(model, nn.Module):
        roots = {"": model}
    elif isinstance(components := getattr(model, "components", None), dict):
        roots = {name: part for name, part in components.items() if _is_of_diffusers(part)}
    else:
        raise TypeError(
            f"{function}: expected model to be a loaded pipeline or model of diffusers, got "
            f"{describe(model)}: DiffusionPipeline.from_pretrained(...) makes one"
        )
    seen: set[int] = set()  # modules may share a processor
    for root, top in roots.items():
        for name, module in top.named_modules(prefix=root):
            processor = vars(module).get("processor")  # a module is among the modules
            yield name, module
            if processor is not None and id(processor) not in seen:
                seen.add(id(processor))
                yield f"{name}.processor".lstrip("."), processor


def _is_of_diffusers(part: Any) -> bool:
    """Whether it is a model of diffusers: a pipeline has text encoders of transformers, too."""
    files = (base.__module__ for base in type(part).__mro__)
    return isinstance(part, nn.Module) and any(f.partition(".")[0] == "diffusers" for f in files)


_DIFFUSERS = Library(_parts, may_rotate, recognize, recognize)
