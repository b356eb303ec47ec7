"""transformers models, rotated by rope_ext.

Patch one loaded model::

    from rope_ext.integrations.transformers import patch

    model = AutoModelForCausalLM.from_pretrained(...)
    print(patch(model))

The files::

    patching.py           patch, unpatch: one loaded model
    method_copies.py      copies of the methods that rotate, with other rotations
    function_copies.py    copies of functions with other globals and cells
    recognition.py        finds out which rotation a model's own function is
    probes.py             the arguments that recognition.py calls functions with
    rotations.py          each of these rotations as calls of the operators
    tables.py             patch(model, tables=True): exact tables in a model's rotary modules
    table_recognition.py  finds out how a rotary module makes its tables
    kernels_hook.py       register_kernels: every model of a process, through the package `kernels`
    families.py           the model families that were tested: families.json
"""

from rope_ext.integrations.transformers.kernels_hook import (
    hooked_rotations,
    kernel_mapping,
    register_kernels,
)
from rope_ext.integrations.transformers.method_copies import UnrecognizedRotation
from rope_ext.integrations.transformers.patching import Report, Site, patch, patched, unpatch

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
