"""The errors of these functions: function, argument, expected, got."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar, cast

from torch import Tensor

from rope_ext._argument_errors import raise_argument_error

Function = TypeVar("Function", bound=Callable[..., Any])


def refuse(function: str, argument: str, expected: str, got: Any) -> NoReturn:
    if isinstance(got, Tensor):
        got = f"shape {list(got.shape)}"
    raise ValueError(f"rope_ext {function}: expected {argument} {expected}, got {got}")


def names_arguments(function: Function) -> Function:
    """The function, with a TypeError that names an argument of the wrong type if it fails."""
    name = function.__qualname__.removesuffix(".forward").rpartition(".")[2]
    name = f"rope_ext {function.__module__.rpartition('.')[2]}.{name}"

    @functools.wraps(function)
    def called(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except (AttributeError, TypeError):
            given = inspect.getcallargs(function, *args, **kwargs)
            raise_argument_error(function, name, given)
            raise

    return cast(Function, called)
