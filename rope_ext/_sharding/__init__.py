"""The operators on DTensors. The import of torch.distributed.tensor brings the rules along.

plan.py   how each operand has to be placed, and what the rank then has of it
rules.py  a rule for each operator
norm_rules.py  and for those that normalise before they rotate
"""

from functools import cache

from rope_ext._on_import import on_import


@cache  # PyTorch takes it once
def register() -> None:
    """Registers the rules: now if there can be a DTensor already, or with the import of DTensor."""
    on_import("torch.distributed.tensor", _register_rules)


def _register_rules() -> None:
    from rope_ext._sharding import norm_rules, rules

    rules.register()
    norm_rules.register()
