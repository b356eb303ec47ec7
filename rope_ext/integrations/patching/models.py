"""The rotations of one loaded model are replaced.

The methods of a module that call a rotation are copied with the replacement (method_copies.py).
The copies become methods of a class that is derived from the module's own and has the same name,
and the module becomes an instance of that class. Other objects that rotate for a module are treated
likewise. So no class changes, files get only globals that nothing else uses, and other models of
the family are not affected.
"""

import contextlib
import copy
import types
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from rope_ext.integrations.patching.library import Library
from rope_ext.integrations.patching.method_copies import (
    MethodCopy,
    Substitute,
    UnrecognizedRotation,
    method_copies,
)
from rope_ext.integrations.patching.recognition import Rotation


@dataclass(frozen=True)
class Site:
    """A place where a model rotates."""

    module: str  # the module's name in the model, '' for the model itself
    method: str  # the method that calls the rotation, or is it
    function: str  # the rotation's name in the model's code
    convention: str  # pairs of channels, and their columns of cos and sin


@dataclass(frozen=True)
class Report:
    """The rotations of a patched model."""

    sites: tuple[Site, ...]
    tables: tuple[str, ...] = ()  # the names of the modules that have exact tables of cos and sin

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
        if self.tables:
            names = ", ".join(name or "the module" for name in self.tables)
            lines.append(f"  exact tables: {names}")
        return "\n".join(lines)


def patch(library: Library, model: Any, tables: bool = False) -> Report:
    """Replaces the rotations of a model, until :func:`unpatch`. Returns all that are replaced now.

    tables: also gives exact tables to the modules that make cos and sin, as library.tables says.

    Raises UnrecognizedRotation, before anything is changed, for a model without any rotation or
    with one that is not recognized.
    """
    _patch(library, model, _by_rope_ext, _UNTIL_UNPATCH, tables)
    return _report(library, model)


def unpatch(library: Library, model: Any) -> None:
    """Undoes :func:`patch` and :func:`patched` for a model or a part of one."""
    for _, part in library.parts("unpatch", model):
        _unpatch(part)


@contextlib.contextmanager
def patched(library: Library, model: Any, tables: bool = False) -> Iterator[Report]:
    """A model that is patched within a ``with`` block. The block gets the report."""
    with substituted(library, model, _by_rope_ext, tables):
        yield _report(library, model)


@contextlib.contextmanager
def substituted(
    library: Library, model: Any, substitute: Substitute, tables: bool = False
) -> Iterator[None]:
    """A model that rotates by other functions within a ``with`` block.

    substitute: makes the replacement from the model's own function and its rotation.
    """
    reason = object()
    modules = _patch(library, model, substitute, reason, tables)
    try:
        yield
    finally:
        for module in modules:
            _release(module, reason)


_UNTIL_UNPATCH = object()  # the reason of patch; each block has its own


def _by_rope_ext(function: Callable[..., Any], rotation: Rotation) -> Callable[..., Any]:
    return rotation.replacement


def _patch(
    library: Library, model: Any, substitute: Substitute, reason: object, tables: bool
) -> list[Any]:
    """Patches unpatched modules, and adds the reason to all patched modules, which it returns."""
    before: list[Any] = []  # patched by earlier calls
    changes: list[tuple[Any, type]] = []
    classes: dict[type, type | None] = {}
    rotary: dict[Any, tuple[Any, str]] = {}  # what makes tables: how, and its name
    exact = library.tables if tables else None
    for name, module in library.parts("patch", model):
        own = type(module)
        if issubclass(own, _Patched):
            if own._rope_ext_substitute is not substitute:
                raise RuntimeError(
                    f"patch: expected module {name!r} to have its own rotations, got others that "
                    "are in their place for the length of a block: patch outside of that"
                )
            before.append(module)
            continue
        if own not in classes:
            methods = method_copies(own, library, substitute)
            classes[own] = _derived(own, methods, substitute) if methods else None
        if exact and classes[own] is None and exact.are_made_by(module):
            classes[own] = _derived(own, exact.methods(own), substitute, exact.base)
        if exact and issubclass(classes[own] or own, exact.base):
            rotary[module] = exact.recognize(module, name), name
        derived = classes[own]
        _check_own_methods(library, module, derived._rope_ext_methods if derived else {}, name)
        if derived is not None:
            changes.append((module, derived))
    now = _report(library, model)
    if not changes and not now.sites and not now.tables:
        raise UnrecognizedRotation(
            "patch: expected model to have modules that call a rotation, such as "
            f"apply_rotary_pos_emb, got {type(model).__name__} without any"
        )
    if exact and not rotary and not any(isinstance(module, exact.base) for module in before):
        raise UnrecognizedRotation(
            "patch: expected tables=True for a model with modules that make cos and sin of "
            f"position_ids times inv_freq, got {type(model).__name__}, which has no such "
            "module; nothing has been changed"
        )
    try:
        for derived in dict.fromkeys(derived for _, derived in changes):
            for method in derived._rope_ext_methods.values():
                method.bind()
        for module, derived in changes:
            module.__class__ = derived
            derived._rope_ext_reasons[module] = {reason}
            for method in derived._rope_ext_methods.values():
                _rebind(module, method.original, method.function)
            if module in rotary:
                module._rope_ext_begin(*rotary[module])
    except BaseException:  # a module may refuse the change: change all of them or none
        for module, derived in changes:
            _unpatch(module)
            _retire_if_unused(derived)
        raise
    for module in before:
        type(module)._rope_ext_reasons.setdefault(module, set()).add(reason)
    return [*before, *(module for module, _ in changes)]


def _release(module: Any, reason: object) -> None:
    """Removes a reason to be patched from a module, and unpatches it without any reason left."""
    reasons = getattr(type(module), "_rope_ext_reasons", {}).get(module, set())
    if reason in reasons:
        reasons.remove(reason)
        if not reasons:
            _unpatch(module)


def _unpatch(module: Any) -> None:
    patched_class = type(module)
    if not issubclass(patched_class, _Patched):
        return
    if "_rope_ext_original" not in vars(patched_class):
        raise RuntimeError(
            "unpatch: expected a module as patch left it, got one whose class has become "
            f"{patched_class.__name__} since: unpatch before that"
        )
    module._rope_ext_end()
    module.__class__ = patched_class._rope_ext_original
    for method in patched_class._rope_ext_methods.values():
        _rebind(module, method.function, method.original)
    patched_class._rope_ext_reasons.pop(module, None)
    _retire_if_unused(patched_class)


def _retire_if_unused(patched_class: type) -> None:
    """Releases the copied methods of a class, and so the globals that they need."""
    if not patched_class._rope_ext_reasons:
        for name in patched_class._rope_ext_methods:
            delattr(patched_class, name)
        patched_class._rope_ext_methods.clear()


def _rebind(module: Any, before: Callable[..., Any], now: Callable[..., Any]) -> None:
    """Replaces bound methods that a module holds: accelerate's hooks keep the forward they wrap."""
    for name, value in list(vars(module).items()):
        if isinstance(value, types.MethodType) and value.__func__ is before:
            setattr(module, name, types.MethodType(now, module))


def _report(library: Library, model: Any) -> Report:
    changed = [
        (name, module)
        for name, module in library.parts("patch", model)
        if issubclass(type(module), _Patched)
    ]
    return Report(
        tuple(
            Site(name, method, function, rotation.convention)
            for name, module in changed
            for method, copied in type(module)._rope_ext_methods.items()
            for function, rotation in sorted(copied.rotations.items())
        ),
        tuple(n for n, x in changed if library.tables and isinstance(x, library.tables.base)),
    )


def _check_own_methods(
    library: Library, module: Any, methods: dict[str, MethodCopy], name: str
) -> None:
    """Raises for a module with a method of its own that rotates, or that replaces one that does.

    methods: those of its class that rotate. A forward that accelerate's hooks keep is allowed.
    """
    for method, own in vars(module).items():
        if method in methods:
            held = (own, vars(module).get("_old_forward") if method == "forward" else None)
            original = methods[method].original
            refused = all(getattr(bound, "__func__", None) is not original for bound in held)
        else:
            function = getattr(own, "__func__", own)
            refused = hasattr(type(module), method) and bool(
                MethodCopy(type(module), method, function, library, _by_rope_ext).function
            )
        if refused:
            raise UnrecognizedRotation(
                f"patch: expected module {name!r} to have the {method} of its class "
                f"{type(module).__name__}, got one of its own: patch before whatever replaces it; "
                "nothing has been changed"
            )


class _Patched:
    """A base of the classes of patched modules."""

    _rope_ext_original: type  # the module's class before
    _rope_ext_methods: dict[str, MethodCopy]
    _rope_ext_substitute: Substitute
    # The modules of the class, each with its reasons: calls of patch and blocks.
    _rope_ext_reasons: weakref.WeakKeyDictionary[Any, set[object]]

    def _rope_ext_end(self) -> None:
        """Called before the object gets its class back."""

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
        """A patched copy, with the state that pickle would take."""
        new = type(self).__new__(type(self))
        self._rope_ext_reasons[new] = {_UNTIL_UNPATCH}
        if memo is not None:
            memo[id(self)] = new
        state = copied(super().__reduce_ex__(2)[2])
        if hasattr(new, "__setstate__"):
            new.__setstate__(state)
        elif state:  # a plain object's, without __setstate__, are its attributes
            vars(new).update(state)
        return new


def _derived(own: type, methods: dict[str, Any], substitute: Substitute, *bases: type) -> type:
    """The class of patched instances of `own`."""
    namespace: dict[str, Any] = {
        "__module__": own.__module__,
        "__qualname__": own.__qualname__,
        "__doc__": own.__doc__,
        "_rope_ext_original": own,
        "_rope_ext_methods": methods,
        "_rope_ext_substitute": staticmethod(substitute),
        "_rope_ext_reasons": weakref.WeakKeyDictionary(),
    }
    for name, copied in methods.items():
        namespace[name] = staticmethod(copied.function) if copied.static else copied.function
    return type(own.__name__, (*bases, _Patched, own), namespace)
