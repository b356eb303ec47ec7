"""transformers models, rotated by rope_ext.

    from rope_ext.integrations.transformers import patch

    model = AutoModelForCausalLM.from_pretrained(...)
    print(patch(model))

patching.py      patch, unpatch: one loaded model
recognition.py   which rotation a model's own function is
rotations.py     each of these rotations as calls of the operators
kernels_hook.py  register_kernels: every model of a process, through the package `kernels`
families.py      the model families that this has been tested on: families.json, the tests' record
"""

from rope_ext.integrations.transformers.kernels_hook import (
    hooked_rotations,
    kernel_mapping,
    register_kernels,
)
from rope_ext.integrations.transformers.patching import (
    Report,
    Site,
    UnrecognizedRotation,
    patch,
    patched,
    unpatch,
)

__all__ = [
    "Report",
    "Site",
    "UnrecognizedRotation",
    "hooked_rotations",
    "kernel_mapping",
    "patch",
    "patched",
    "register_kernels",
    "unpatch",
]
