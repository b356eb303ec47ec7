"""Reads the entries of a config and checks their type and size."""

from collections.abc import Mapping, Sequence
from typing import Any

from rope_ext.frequencies.bounds import check_integer, check_number, refuse

MOST_LAYERS = 65_536


class Entries:
    """A config object of transformers, or a dict as in config.json.

    Each method takes the names that an entry has had and returns the first value that is not None,
    else the default. A value of a wrong type or size raises a ValueError that names the entry.
    """

    def __init__(self, config: Any) -> None:
        self.config = config
        self.is_dict = isinstance(config, Mapping)

    def first(self, *names: str) -> tuple[str, Any]:
        """The name that the entry has in this config, and its value, of any type."""
        for name in names:
            value = self.config.get(name) if self.is_dict else getattr(self.config, name, None)
            if value is not None:
                return name, value
        return names[0], None

    def lacks(self, name: str) -> bool:
        """Whether a config.json omits the entry, so that the config's class has the default."""
        return self.is_dict and name not in self.config

    def number(self, *names: str, default: Any = None, **bounds: float) -> Any:
        """A finite number, within bounds as for check_number."""
        name, value = self.first(*names)
        if value is None:
            return default
        check_number("from_config", name, value, **bounds)
        return value

    def integer(self, *names: str, default: Any = None, **bounds: int) -> Any:
        """A number of channels, heads or tokens, within bounds as for check_integer."""
        name, value = self.first(*names)
        if value is None:
            return default
        check_integer("from_config", name, value, **bounds)
        return value

    def flag(self, name: str, default: bool) -> bool:
        return self._of_kind(name, bool, "true or false", default)

    def text(self, name: str, default: str) -> str:
        return self._of_kind(name, str, "a string", default)

    def mapping(self, name: str) -> Mapping[str, Any]:
        return self._of_kind(name, Mapping, "a dict", {})

    def per_layer(self, *names: str, kind: type | tuple[type, ...], in_words: str) -> Sequence[Any]:
        """A list with a value for each layer, such as layer_types; empty if there is none."""
        name, values = self.first(*names)
        if values is None:
            return ()
        if not isinstance(values, (list, tuple)) or len(values) > MOST_LAYERS:
            refuse("from_config", name, f"a list of at most {MOST_LAYERS}, each {in_words}", values)
        for i, value in enumerate(values):
            if not isinstance(value, kind):
                refuse("from_config", f"{name}[{i}]", in_words, value)
        return values

    def _of_kind(self, name: str, kind: type, in_words: str, default: Any) -> Any:
        _, value = self.first(name)
        if value is None:
            return default
        if not isinstance(value, kind):
            refuse("from_config", name, in_words, value)
        return value
