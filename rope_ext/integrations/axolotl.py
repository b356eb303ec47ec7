"""Models that Axolotl trains, rotated by rope_ext: a plugin.

In the YAML file of a training::

    plugins:
      - rope_ext.integrations.axolotl.RopeExtPlugin

Source: axolotl 0.19.0, ``integrations/base.py`` and ``loaders/model.py``.
"""

from typing import Any

from axolotl.integrations.base import BasePlugin
from axolotl.utils.logging import get_logger
from torch import nn

from rope_ext.integrations.transformers import patch

LOG = get_logger("axolotl.rope_ext")  # Axolotl shows what loggers of this prefix inform about


class RopeExtPlugin(BasePlugin):  # type: ignore[misc]
    """Patches each model that Axolotl loads, for training, as a reference and for inference."""

    def register(self, cfg: dict[str, Any]) -> None:
        """Reads the configuration before it is checked.

        Raises:
            ValueError: for an option that replaces the rotation by another kernel.
        """
        for option in ("liger_rope", "fused_attn_kernel"):
            if cfg.get(option):
                raise ValueError(
                    f"rope_ext RopeExtPlugin: expected {option} to be false, as it replaces the "
                    f"rotation by another kernel, got {cfg[option]!r}: remove it, or this plugin"
                )

    def post_model_load(self, cfg: Any, model: nn.Module) -> None:
        """Patches a model with its adapters, and logs where it rotates.

        Raises:
            UnrecognizedRotation: if the model's rotation is not known. The training stops.
        """
        LOG.info(str(patch(model)))
