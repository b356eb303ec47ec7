"""diffusers models, rotated by rope_ext.

Patch a pipeline, or one loaded model::

    from rope_ext.integrations.diffusers import patch

    pipeline = DiffusionPipeline.from_pretrained(...)
    print(patch(pipeline))

The files::

    loaded_models.py  patch, unpatch: a pipeline or a model, by the room `patching`
    forms.py          which form a model's own function has
    probes.py         the arguments that the forms are tested with
    rotations.py      the forms, each as calls of the operators
"""

from rope_ext.integrations.diffusers.loaded_models import patch, patched, unpatch
from rope_ext.integrations.patching.method_copies import UnrecognizedRotation
from rope_ext.integrations.patching.models import Report, Site

__all__ = ["Report", "Site", "UnrecognizedRotation", "patch", "patched", "unpatch"]
