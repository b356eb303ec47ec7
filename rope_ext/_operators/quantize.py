"""The rotation whose result is float8 with a scale of each group of channels: it writes, and has no
derivative.
"""

from rope_ext._engine.record import Given, Operator
from rope_ext._engine.sharding import HEADS, Sharding, rotation_sharding
from rope_ext._operators.rotation import ONE


def _quantize_sharding(operator: Operator, given: Given) -> Sharding:
    """`x_out` and its scales are placed as x."""
    return rotation_sharding(operator, given, heads=(HEADS, HEADS), is_linear=False)


QUANTIZE = (Operator("apply_rotary_quantize", ONE, flops_channel=1, sharding=_quantize_sharding),)
