"""A loaded transformers model, rotated by rope_ext.

from rope_ext.integrations.transformers import patch

model = AutoModelForCausalLM.from_pretrained(...)
print(patch(model))
"""

from rope_ext.integrations.transformers.patching import (
    Report,
    Site,
    UnrecognizedRotation,
    patch,
    patched,
    unpatch,
)

__all__ = ["Report", "Site", "UnrecognizedRotation", "patch", "patched", "unpatch"]
