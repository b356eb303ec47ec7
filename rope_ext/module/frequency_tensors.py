"""The frequencies of a module: always float32, on the module's device."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class FrequencyTensors(nn.Module):
    """Holds the tensors of :meth:`_frequencies` as buffers or, if they are learned, as parameters.

    ``.to(...)`` moves them to another device, but ``.half()`` and similar calls do not change their
    dtype. Buffers are not in the state dict, as they follow from the module's arguments. An
    ``inv_freq`` in the state dict of an older checkpoint is accepted and ignored.
    """

    inv_freq: Tensor  # float32 [P], radians per token
    learned: bool

    def _frequencies(self, device: torch.device | str | None) -> tuple[Any, ...]:
        """The tensors by name, on the device; a subclass may return more values after them."""
        raise NotImplementedError

    def _hold_frequencies(self, made: dict[str, Tensor]) -> None:
        for name, tensor in made.items():
            if self.learned:
                self.register_parameter(name, nn.Parameter(tensor))
            else:
                self.register_buffer(name, tensor, persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "FrequencyTensors":
        """Moves to another device, but keeps dtypes, and the values after to_empty()."""
        was_meta = self.inv_freq.is_meta

        def moved(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            return result if tensor.is_meta else tensor.to(result.device)

        with torch.inference_mode(False):  # a tensor moved in inference mode may be written later
            super()._apply(moved, recurse)
            if was_meta and not self.inv_freq.is_meta:
                made, *_ = self._frequencies(self.inv_freq.device)
                for name, tensor in made.items():
                    if self.learned:
                        setattr(self, name, nn.Parameter(tensor, getattr(self, name).requires_grad))
                    else:
                        setattr(self, name, tensor)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if not self.learned:
            state_dict.pop(prefix + "inv_freq", None)
        super()._load_from_state_dict(state_dict, prefix, *args)
        if self.learned and self.inv_freq.dtype != torch.float32:  # load_state_dict(assign=True)
            inv_freq = self.inv_freq
            self.inv_freq = nn.Parameter(inv_freq.detach().float(), inv_freq.requires_grad)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        with torch.inference_mode(False):  # a copy made in inference mode may be written later
            for name, buffer in self._buffers.items():
                if buffer is not None and buffer.is_inference():
                    self._buffers[name] = buffer.clone()
            for name, learned in self._parameters.items():
                if learned is not None and learned.is_inference():
                    self._parameters[name] = nn.Parameter(learned.clone(), learned.requires_grad)
