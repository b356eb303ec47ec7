"""patch(model): the rotation of one loaded model, replaced.

The methods of a module that call a rotation are compiled once more from their own source, with the
rotation's name bound to its replacement (rebuilding.py). They become the methods of a class derived
from the module's own, of the same name, and the module becomes an instance of that class. So
neither classes nor their files' globals change, and another model of the family goes on as it was.
"""

import contextlib
import copy
import os
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from rope_ext._explaining import describe
from rope_ext.integrations.transformers.rebuilding import (
    RebuiltMethod,
    Substitute,
    UnrecognizedRotation,
    rebuilt_methods,
)
from rope_ext.integrations.transformers.recognition import Rotation


@dataclass(frozen=True)
class Site:
    """A place where a model rotates."""

    module: str  # its name in the model, '' for the model itself
    method: str  # that calls the rotation, or is it
    function: str  # the rotation, as the model's code names it
    convention: str  # which pairs of channels turn by which columns of cos and sin


@dataclass(frozen=True)
class Report:
    """What rotates with rope_ext in a patched model."""

    sites: tuple[Site, ...]

    @property
    def modules(self) -> tuple[str, ...]:
        """The names of the modules that rotate with rope_ext."""
        return tuple(dict.fromkeys(site.module for site in self.sites))

    @property
    def conventions(self) -> tuple[str, ...]:
        """The different conventions, in the order of the model's modules."""
        return tuple(dict.fromkeys(site.convention for site in self.sites))

    def __str__(self) -> str:
        lines = [f"rope_ext rotates in {len(self.modules)} modules:"]
        for convention in self.conventions:
            sites = [site for site in self.sites if site.convention == convention]
            calls = ", ".join(dict.fromkeys(f"{site.method} -> {site.function}" for site in sites))
            where = sites[0].module or "the model"
            lines.append(f"  {convention}: {calls} ({len(sites)}, from {where})")
        return "\n".join(lines)


def patch(model: nn.Module) -> Report:
    """Lets a loaded transformers model rotate its queries and keys with rope_ext.

    Only this model changes; its parameters, tables of cos and sin, cache and outputs keep their
    form. A patched model trains, generates, compiles and is copied as before; one that was compiled
    earlier compiles again (before torch 2.12 it goes on as it was, until torch.compiler.reset()).
    Saved as a whole and loaded again it is an unpatched model. The result has q's dtype: where a
    model's own function would return float32 for a bfloat16 q because its tables are float32, the
    patched model does not.

    Each rotation is recognized by the names of its parameters and by what it computes for a few
    numbers, never by the model's name: see recognition.py. It is called for that, and afterwards no
    more: what else it does, such as counting its calls, is not done.

    Args:
        model: any module that holds transformers' attention modules, such as a model, or one layer.

    Returns:
        All places that now rotate with rope_ext, also those that an earlier call replaced.

    Raises:
        UnrecognizedRotation: when the model has no rotation, or one that is not recognized. Nothing
            has been changed then.
        TypeError: for what is no module: the name of a model, its class, its config.
    """
    _patch(model, _by_rope_ext)
    return _report(model)


def unpatch(model: nn.Module) -> None:
    """Undoes :func:`patch`, for a model or any part of one, if it was patched."""
    _check_is_loaded("unpatch", model)
    for module in model.modules():
        _unpatch(module)


@contextlib.contextmanager
def patched(model: nn.Module) -> Iterator[Report]:
    """A model, patched for the length of a ``with`` block, which gets the report."""
    with substituted(model, _by_rope_ext):
        yield _report(model)


@contextlib.contextmanager
def substituted(model: nn.Module, substitute: Substitute) -> Iterator[None]:
    """A model that rotates by other functions, for the length of a ``with`` block.

    substitute: makes what is called instead, from the model's own function and what it computes.
    """
    changed = _patch(model, substitute)
    try:
        yield
    finally:
        for module in changed:
            _unpatch(module)


def _by_rope_ext(function: Callable[..., Any], rotation: Rotation) -> Callable[..., Any]:
    return rotation.replacement


def _patch(model: nn.Module, substitute: Substitute) -> list[nn.Module]:
    """Patches what isn't patched; the modules that it changed."""
    _check_is_loaded("patch", model)
    changes: list[tuple[nn.Module, type]] = []
    classes: dict[type, type | None] = {}
    for name, module in model.named_modules():
        own = type(module)
        if issubclass(own, _Patched):
            continue
        if own not in classes:
            methods = rebuilt_methods(own, substitute)
            classes[own] = _derived(own, methods) if methods else None
        derived = classes[own]
        if derived is not None:
            _check_not_wrapped(module, derived._rope_ext_methods, name)
            changes.append((module, derived))
    if not changes and not _report(model).sites:
        raise UnrecognizedRotation(
            "patch: expected model to have modules that call a rotation, such as "
            f"apply_rotary_pos_emb, got {type(model).__name__} without any"
        )
    changed: list[nn.Module] = []
    try:
        for module, derived in changes:
            module.__class__ = derived
            changed.append(module)
            for method in derived._rope_ext_methods.values():
                _rebind(module, method.original, method.function)
    except BaseException:  # a module may not let itself be changed: all of them or none
        for module in changed:
            _unpatch(module)
        raise
    return changed


def _unpatch(module: nn.Module) -> None:
    patched_class = type(module)
    if not issubclass(patched_class, _Patched):
        return
    if "_rope_ext_original" not in vars(patched_class):
        raise RuntimeError(
            "unpatch: expected a module as patch left it, got one whose class has become "
            f"{patched_class.__name__} since: unpatch before that"
        )
    module.__class__ = patched_class._rope_ext_original
    for method in patched_class._rope_ext_methods.values():
        _rebind(module, method.function, method.original)


def _rebind(module: nn.Module, before: Callable[..., Any], now: Callable[..., Any]) -> None:
    """Bound methods that a module itself holds: accelerate's hooks keep the forward they wrap."""
    for name, value in list(vars(module).items()):
        if isinstance(value, types.MethodType) and value.__func__ is before:
            setattr(module, name, types.MethodType(now, module))


def _report(model: nn.Module) -> Report:
    return Report(
        tuple(
            Site(name, method, function, rotation.convention)
            for name, module in model.named_modules()
            if issubclass(type(module), _Patched)
            for method, rebuilt in type(module)._rope_ext_methods.items()
            for function, rotation in rebuilt.rotations.items()
        )
    )


def _check_not_wrapped(module: nn.Module, methods: dict[str, RebuiltMethod], name: str) -> None:
    """Refuses a module with a method of its own that calls the class's, other than accelerate's."""
    for method, rebuilt in methods.items():
        own = vars(module).get(method)
        held = (own, vars(module).get("_old_forward") if method == "forward" else None)
        if own is not None and all(
            getattr(bound, "__func__", None) is not rebuilt.original for bound in held
        ):
            raise UnrecognizedRotation(
                f"patch: expected module {name!r} to have the {method} of its class "
                f"{type(module).__name__}, got one of its own: patch before whatever replaces it"
            )


def _check_is_loaded(function: str, model: Any) -> None:
    """Refuses what a model is made of: a name, a path, a class, a config, weights."""
    if isinstance(model, nn.Module):
        return
    loaded = "AutoModelForCausalLM.from_pretrained(...)"
    if isinstance(model, (str, os.PathLike)):
        loaded = f"AutoModelForCausalLM.from_pretrained({os.fspath(model)!r})"
    elif isinstance(model, type) and issubclass(model, nn.Module):
        loaded = f"{model.__name__}.from_pretrained(...)"
    elif hasattr(model, "model_type"):
        loaded = "AutoModelForCausalLM.from_config(config)"
    raise TypeError(
        f"{function}: expected model to be a loaded model, got {describe(model)}: {loaded} makes "
        "one"
    )


class _Patched:
    """Mixed into the classes of patched modules."""

    _rope_ext_original: type  # the module's class before
    _rope_ext_methods: dict[str, RebuiltMethod]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickles as the original class, which needs no rope_ext to be loaded."""
        _, (_, *arguments), *rest = super().__reduce_ex__(protocol)
        original = type(self)._rope_ext_original
        return (original.__new__, (original, *arguments), *rest)

    def __copy__(self) -> Any:
        return self._copied(lambda state: dict(state))

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return self._copied(lambda state: copy.deepcopy(state, memo), memo)

    def _copied(self, copied: Callable[[Any], Any], memo: dict[int, Any] | None = None) -> Any:
        """A patched copy; the state is what pickle would take."""
        new = type(self).__new__(type(self))
        if memo is not None:
            memo[id(self)] = new
        new.__setstate__(copied(self.__reduce_ex__(2)[2]))
        return new


def _derived(own: type, methods: dict[str, RebuiltMethod]) -> type:
    """The class of own's patched instances."""
    namespace: dict[str, Any] = {
        "__module__": own.__module__,
        "__qualname__": own.__qualname__,
        "__doc__": own.__doc__,
        "_rope_ext_original": own,
        "_rope_ext_methods": methods,
    }
    for name, rebuilt in methods.items():
        namespace[name] = staticmethod(rebuilt.function) if rebuilt.static else rebuilt.function
    return type(own.__name__, (_Patched, own), namespace)
