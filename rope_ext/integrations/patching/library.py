"""What the patch of a model has to know of the model's library."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from rope_ext.integrations.patching.recognition import Rotation


class Tables(NamedTuple):
    """Exact tables of cos and sin in the place of a model's own."""

    are_made_by: Callable[[Any], bool]  # a module
    recognize: Callable[[Any, str], Any]  # how a module, and its name, makes them; or raises
    # A base of the classes of such modules: its _rope_ext_begin gets what was recognized and the
    # name, and _rope_ext_end undoes it.
    base: type
    methods: Callable[[type], dict[str, Any]]  # those of such a module's class, as MethodCopy


class Library(NamedTuple):
    # The name of the called function and the model: everything in the model that may rotate, by
    # name. Raises TypeError for what is no loaded model.
    parts: Callable[[str, Any], Iterable[tuple[str, Any]]]
    may_rotate: Callable[[Any], bool]  # whether a function with a rotation's name may be one
    recognize: Callable[[Any], Rotation | None]  # a function
    recognize_method: Callable[[Any], Rotation | None]  # a method that has a rotation's name
    tables: Tables | None = None
