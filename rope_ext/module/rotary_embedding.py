"""RotaryEmbedding: its arguments and its calls."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from rope_ext import frequencies
from rope_ext._argument_errors import raise_argument_error, shown
from rope_ext._engine.direct import direct_call
from rope_ext.frequencies import config as configs
from rope_ext.frequencies.bounds import LAST_POSITION, exponents
from rope_ext.frequencies.scaling import BY_LENGTH, rope_type_of, split_scaling
from rope_ext.module.frequencies_by_length import (
    DynamicNtk,
    LongRope,
    check_one_length_each,
    checked_regime_length,
    longest,
)
from rope_ext.module.frequency_tensors import FrequencyTensors
from rope_ext.module.tables import TableCache, tables
from rope_ext.options import Layout, as_bshd
from rope_ext.rotation import apply_rotary_qk

_rotate, _rotate_in_place = direct_call("apply_rotary_qk"), direct_call("apply_rotary_qk_")
_rotate_at, _rotate_at_in_place = map(direct_call, ("apply_rotary_qk_at", "apply_rotary_qk_at_"))


class RotaryEmbedding(FrequencyTensors):
    """Rotates q and k by their positions.

    With position_ids the angles are computed for these positions in each call. Without, they come
    from a table of the positions 0, 1, 2, ..., which at least doubles for a longer sequence. Tokens
    with several positions need rows of ``cos_sin(module.inv_freq, position_ids, axes=...)``.
    inv_freq and the table stay float32 through ``.half()`` and ``.bfloat16()``. Neither is in the
    state dict, as they follow from the arguments. An ``inv_freq`` in the state dict of an older
    checkpoint is accepted and ignored. Only learned frequencies are parameters, and in the state
    dict. The table follows writes into inv_freq, except writes through ``.data`` to frequencies
    that are not learned: PyTorch does not count those.

    Two scalings have frequencies that depend on the length of the sequence. As in transformers, the
    length is one more than the largest position of a call, over the whole batch:

    - "dynamic": beyond the original length, the frequencies are stretched for the longest sequence
      so far, until a sequence is shorter than the original length. The module remembers this length
      as ``max_seq_len_cached``, a tensor on the device.
    - "longrope": long factors for sequences past the original length, else short ones.

    Keys in a cache stay as they were rotated. So a sequence that crosses the original length during
    decoding has keys with two sets of frequencies, as in transformers. `regime_length` avoids that:
    it is the final length of a sequence, such as that of its prompt and its new tokens together. If
    it is given in each call, it alone decides the frequencies of the sequence, for any other
    sequences in the batch. It also makes "dynamic" work with activation checkpointing, which calls
    the module a second time, after ``max_seq_len_cached`` has changed.

    Args:
        head_dim: channels of a head, D.
        base: see :func:`rope_ext.frequencies.default`. None: rope_theta of scaling, else 10,000.
        rotary_dim: channels that rotate, R: even, 2 <= R <= D. None: partial_rotary_factor of
            scaling times D, or D.
        max_position_embeddings: positions that the model is meant for, in tokens, below 2^31. Not a
            limit: the table starts with at most this many rows, or 2048, and longer sequences are
            rotated just as exactly. None: unknown; a scaling that needs the number raises.
        scaling: rope_type and its parameters, in the terms of Hugging Face; see
            :func:`rope_ext.frequencies.from_scaling`. rope_theta and partial_rotary_factor may be
            among them. None: "default".
        learned: inv_freq is a parameter; training starts from the frequencies of `scaling`.
        interleaved: pairs are neighbouring channels instead of halves.
        device: of inv_freq; the module's ``.to(...)`` moves it.

    Raises:
        ValueError: for an argument out of bounds, and for learned frequencies with a scaling whose
            frequencies depend on the length.
    """

    inv_freq: Tensor  # float32 [P], radians per token; up to the original length
    long_inv_freq: Tensor  # float32 [P], for longrope, past the original length
    exponents: Tensor  # float32 [P], for dynamic: those of the base
    max_seq_len_cached: Tensor  # int64 [], for dynamic: the length that decides

    def __init__(
        self,
        head_dim: int,
        *,
        base: float | None = None,
        rotary_dim: int | None = None,
        max_position_embeddings: int | None = None,
        scaling: Mapping[str, Any] | None = None,
        learned: bool = False,
        interleaved: bool = False,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if max_position_embeddings is not None and (
            not isinstance(max_position_embeddings, int)
            or isinstance(max_position_embeddings, bool)
            or not 1 <= max_position_embeddings <= LAST_POSITION
        ):
            raise ValueError(
                "RotaryEmbedding: expected max_position_embeddings to be an integer of at least 1 "
                f"and at most {LAST_POSITION}, got {shown(max_position_embeddings)}"
            )
        self.head_dim = head_dim
        self.base, self.rotary_dim, self.scaling = split_scaling(
            head_dim, base, rotary_dim, scaling
        )
        self.max_position_embeddings = max_position_embeddings
        self.rope_type = rope_type_of(self.scaling)
        self.learned = learned
        self.interleaved = interleaved
        if learned and self.rope_type in BY_LENGTH:
            raise ValueError(
                "RotaryEmbedding: expected a rope_type whose frequencies do not depend on the "
                f"length when learned=True, got {self.rope_type!r}"
            )
        with torch.inference_mode(False):  # tensors made in inference mode can't be trained
            made, self.attention_scaling, self.long_attention_scaling = self._frequencies(device)
        self._hold_frequencies(made)
        # Tables [L, P] are not buffers: they follow from inv_freq and are made when needed.
        self._tables = TableCache()

    @classmethod
    def from_config(
        cls,
        config: Any,
        layer_type: str | None = None,
        *,
        learned: bool = False,
        interleaved: bool | None = None,
        device: torch.device | str | None = None,
    ) -> "RotaryEmbedding | None":
        """The rotation that a Hugging Face config defines; None if such layers do not rotate.

        Args:
            config, layer_type: as for :func:`rope_ext.frequencies.from_config`.
            learned, device: as for the class.
            interleaved: as for the class. None: as in transformers for the config's model_type.

        Raises:
            ValueError: as :func:`rope_ext.frequencies.from_config`; for the configs of vision
                towers, whose tokens have several positions each; and for models that rotate in more
                than one way.
        """
        resolved = configs.resolve(config, layer_type)
        if resolved is None:
            return None
        if resolved.scaling["rope_type"] == "axial":
            raise ValueError(
                "RotaryEmbedding.from_config: expected tokens of one position each, got the "
                "rope_type 'axial': see rope_ext.frequencies.axial"
            )
        if resolved.other_rotation is not None:
            raise ValueError(
                "RotaryEmbedding.from_config: expected a model_type with one rotation, of the "
                f"first channels of a head, got one that {resolved.other_rotation}: see "
                "rope_ext.frequencies.from_config and rope_ext.apply_rotary"
            )
        return cls(
            resolved.head_dim,
            base=resolved.base,
            rotary_dim=resolved.rotary_dim,
            max_position_embeddings=resolved.max_position_embeddings,
            scaling=resolved.scaling,
            learned=learned,
            interleaved=resolved.interleaved if interleaved is None else interleaved,
            device=device,
        )

    def _frequencies(
        self, device: torch.device | str | None
    ) -> tuple[dict[str, Tensor], float, float]:
        """The tensors by name, then the factors on cos and sin of short and long sequences."""

        def make(length: int | None) -> tuple[Tensor, float]:
            return frequencies.from_scaling(
                self.head_dim,
                self.scaling,
                base=self.base,
                rotary_dim=self.rotary_dim,
                max_position_embeddings=self.max_position_embeddings,
                length=length,
                device=device,
            )

        inv_freq, scaling = make(None)
        made, long_scaling = {"inv_freq": inv_freq}, scaling
        if self.rope_type == "longrope":
            made["long_inv_freq"], long_scaling = make(self.original_max_position_embeddings + 1)
        elif self.rope_type == "dynamic":
            made["exponents"] = exponents(self.rotary_dim, device)
            made["max_seq_len_cached"] = torch.full(
                (), self.original_max_position_embeddings, dtype=torch.int64, device=device
            )
        return made, scaling, long_scaling

    @property
    def original_max_position_embeddings(self) -> int:
        """The longest sequence of the training before the context was extended, in tokens."""
        key = "original_max_position_embeddings"
        return self.scaling.get(key, self.max_position_embeddings)

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        position_ids: Tensor | None = None,
        layout: Layout = "bshd",
        *,
        regime_length: int | Tensor | None = None,
        inplace: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Returns q and k, rotated.

        Args:
            q: [B, S, H, D] or, by layout, "bhsd", "sbhd" or "thd" ([T, H, D]).
            k: of q's shape and dtype, but for its number of heads.
            position_ids: int32, int64 or floating [S], [1|B, S], or [T] for "thd", in tokens, of
                any size. None: 0, 1, 2, ... in each sequence.
            layout: the order of the dimensions of q and k.
            regime_length: for "dynamic" and "longrope", the length in tokens that decides the
                frequencies: an integer, or int32 or int64 [], or one for each sequence [B], or for
                "thd" one for each token [T]. Does not change max_seq_len_cached. No effect on other
                scalings. None: one more than the largest position.
            inplace: write into q and k.

        Raises:
            RuntimeError, TypeError, ValueError: as :func:`rope_ext.apply_rotary`.
        """
        if regime_length is None and type(inplace) is bool and not is_dynamo_compiling():
            rotated = _rotate_directly(self.__dict__, q, k, position_ids, layout, inplace)
            if rotated is not NotImplemented:
                return (q, k) if rotated is None else rotated
        try:
            view = as_bshd(q, layout, "RotaryEmbedding", "q")
            seq, head_dim = view.size(-3), view.size(-1)
            if head_dim != self.head_dim:
                raise ValueError(
                    f"RotaryEmbedding: expected q to have head_dim {self.head_dim}, got {head_dim}"
                )
            packed = layout == "thd"
            if position_ids is not None and position_ids.dim() > (1 if packed else 2):
                raise ValueError(
                    "RotaryEmbedding: expected position_ids to have shape "
                    f"{'[T]' if packed else '[S] or [1|B, S]'}, got {list(position_ids.shape)}"
                )
            if isinstance(regime_length, Tensor) and regime_length.dim() > 0:
                symbol = "[T] = " if packed else "[B] = "
                check_one_length_each(regime_length, view.shape[0], symbol)
                if packed and position_ids is None:
                    position_ids = torch.arange(seq, device=regime_length.device)
            if position_ids is None:
                cos, sin, seen = self._table(seq, regime_length)
            else:
                if not packed and position_ids.dim() == 1:
                    position_ids = position_ids[None]
                cos, sin, seen = self._cos_sin(position_ids, regime_length)
            rotated = apply_rotary_qk(
                q,
                k,
                cos,
                sin,
                interleaved=self.interleaved,
                layout=layout,
                inplace=inplace,
            )
            self._remember(seen)  # only if the call did not raise
            return rotated
        except Exception:
            raise_argument_error(RotaryEmbedding.forward, "RotaryEmbedding")
            raise

    def cos_sin(
        self, position_ids: Tensor, *, regime_length: int | Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """cos and sin, float32 ``[*position_ids.shape, P]``: call it once a step, for all layers.

        Args:
            position_ids: int32, int64 or floating [B, S] or [T], in tokens.
            regime_length: as for :meth:`forward`.
        """
        try:
            cos, sin, seen = self._cos_sin(position_ids, regime_length)
            self._remember(seen)
            return cos, sin
        except Exception:
            raise_argument_error(RotaryEmbedding.cos_sin, "RotaryEmbedding.cos_sin")
            raise

    def _cos_sin(
        self, position_ids: Tensor, regime_length: int | Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """cos, sin, and the new max_seq_len_cached; None: unchanged."""
        inv_freq = self.inv_freq  # only once: attribute look-up in a module is slow
        length = checked_regime_length(regime_length, inv_freq)
        if isinstance(length, Tensor) and length.dim() == 1:
            rows = position_ids.shape[0]
            if position_ids.dim() == 1 or rows != 1:
                check_one_length_each(
                    length, rows, "", f", as position_ids {list(position_ids.shape)}"
                )
        if self.rope_type in BY_LENGTH:
            return self._by_length(position_ids, length)
        return *tables(inv_freq, position_ids, self.attention_scaling), None

    def table(
        self, length: int, *, regime_length: int | Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """cos and sin, float32 [L, P], of the positions 0 to L - 1, where L >= length.

        With a regime_length [B] of "dynamic" or "longrope", one table for each: [B, L, P].
        """
        try:
            cos, sin, seen = self._table(length, regime_length)
            self._remember(seen)
            return cos, sin
        except Exception:
            raise_argument_error(RotaryEmbedding.table, "RotaryEmbedding.table")
            raise

    def _table(
        self, length: int, regime_length: int | Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """cos, sin, and the new max_seq_len_cached; None: unchanged."""
        inv_freq = self.inv_freq
        regime = checked_regime_length(regime_length, inv_freq)
        # A kept table would bind a graph to its length, stop gradients, and miss writes to learned
        # frequencies through .data, which no version counts.
        afresh = torch.compiler.is_compiling() or self.learned or inv_freq.requires_grad
        if self.rope_type == "dynamic" or (
            self.rope_type == "longrope" and (afresh or isinstance(regime, Tensor))
        ):
            return self._by_length(length, regime)
        if afresh:
            return *tables(inv_freq, length, self.attention_scaling), None
        name, scaling = "inv_freq", self.attention_scaling
        if self.rope_type == "longrope":
            name = "short_inv_freq"
            regime = length if regime is None else regime
            if regime > self.original_max_position_embeddings:
                name, scaling = "long_inv_freq", self.long_attention_scaling
                inv_freq = self.long_inv_freq
        rows = min(2048, self.max_position_embeddings or 2048)
        return *self._tables.get(name, inv_freq, scaling, length, rows), None

    def _by_length(
        self, positions: Tensor | int, regime_length: int | Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """cos, sin of position_ids or of 0 to positions - 1, with the frequencies of the length;
        and the new max_seq_len_cached; None: unchanged.
        """
        original = self.original_max_position_embeddings
        if isinstance(regime_length, Tensor):
            length = regime_length.long()
        else:
            given = positions if regime_length is None else regime_length
            length = longest(given, self.inv_freq.device)
        if self.rope_type == "longrope":
            scalings = self.attention_scaling, self.long_attention_scaling
            regimes = LongRope(original, self.inv_freq, self.long_inv_freq, *scalings)
            return *regimes.tables(positions, length), None
        factor = self.scaling["factor"]
        stretched = DynamicNtk(original, factor, self.base, self.exponents, self.inv_freq)
        seen = None
        if regime_length is None:
            length = seen = stretched.longest_so_far(self.max_seq_len_cached, length)
        return *stretched.tables(positions, length), seen

    def _remember(self, seen: Tensor | None) -> None:
        if seen is not None:
            self.max_seq_len_cached.copy_(seen)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "RotaryEmbedding":
        super()._apply(fn, recurse)
        self._tables = TableCache()
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_tables": TableCache()}

    def extra_repr(self) -> str:
        scaled = f"scaling={self.scaling}, " if self.rope_type != "default" else ""
        learned = "learned=True, " if self.learned else ""
        return (
            f"head_dim={self.head_dim}, base={self.base}, rotary_dim={self.rotary_dim}, "
            f"max_position_embeddings={self.max_position_embeddings}, {scaled}{learned}"
            f"interleaved={self.interleaved}"
        )


def _rotate_directly(
    own: dict[str, Any],
    q: Tensor,
    k: Tensor,
    position_ids: Tensor | None,
    layout: str,
    inplace: bool,
) -> Any:
    """What a direct call returns (rope_ext/_engine/direct.py), where the frequencies do not depend
    on lengths. With positions, the rotation by angles has the bits of one by rows.

    own: a module's attributes. To look for one in the module takes three times as long.
    """
    inv_freq = own["_buffers"].get("inv_freq")
    if position_ids is None:
        table = own["_tables"].kept("inv_freq", inv_freq)
        if table is None:
            return NotImplemented
        cos, sin = table
        return (_rotate_in_place if inplace else _rotate)(
            layout, None, own["head_dim"], q, k, cos, sin, None,
            None, 0, own.get("interleaved"), None, False,
        )  # fmt: skip
    if inv_freq is None:
        inv_freq = own["_parameters"].get("inv_freq")
    if (
        type(q) is not Tensor
        or q.dtype is torch.float64  # rows are of float32
        or inv_freq is None
        or inv_freq.dtype is not torch.float32
        or own.get("rope_type") in BY_LENGTH
    ):
        return NotImplemented
    return (_rotate_at_in_place if inplace else _rotate_at)(
        layout, None, own["head_dim"], q, k, inv_freq, position_ids, None,
        own.get("attention_scaling"), 0, own.get("interleaved"), None, False,
    )  # fmt: skip
