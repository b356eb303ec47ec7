"""The duration of an attack: ROPE_EXT_ATTACK_SECONDS, or the default of the test suite."""

import os


def seconds(default: float) -> float:
    return float(os.environ.get("ROPE_EXT_ATTACK_SECONDS", default))
