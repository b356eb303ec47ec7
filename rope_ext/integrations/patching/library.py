"""What the patch of a model has to know of the model's library."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from rope_ext.integrations.patching.recognition import Rotation


class Library(NamedTuple):
    # The name of the called function and the model: everything in the model that may rotate, by
    # name. Raises TypeError for what is no loaded model.
    parts: Callable[[str, Any], Iterable[tuple[str, Any]]]
    may_rotate: Callable[[Any], bool]  # whether a function with a rotation's name may be one
    recognize: Callable[[Any], Rotation | None]  # a function
    recognize_method: Callable[[Any], Rotation | None]  # a method that has a rotation's name
