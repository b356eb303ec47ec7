"""transformers models, rotated by rope_ext.

Patch one loaded model::

    from rope_ext.integrations.transformers import patch

    model = AutoModelForCausalLM.from_pretrained(...)
    print(patch(model))

The files::

    loaded_models.py      patch, unpatch: one loaded model, by the room `patching`
    forms.py              which form a model's own function has
    probes.py             the arguments that the forms are tested with
    rotations.py          each of these rotations as calls of the operators
    tables.py             patch(model, tables=True): exact tables in a model's rotary modules
    table_recognition.py  finds out how a rotary module makes its tables
    kernels_hook.py       register_kernels: every model of a process, through the package `kernels`
    families.py           the model families that were tested: families.json
"""

from rope_ext.integrations.patching.method_copies import UnrecognizedRotation
from rope_ext.integrations.patching.models import Report, Site
from rope_ext.integrations.transformers.kernels_hook import (
    hooked_rotations,
    kernel_mapping,
    register_kernels,
)
from rope_ext.integrations.transformers.loaded_models import patch, patched, unpatch

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
