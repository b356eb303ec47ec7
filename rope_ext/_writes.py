"""What PyTorch has to know about the operators that write, in place, into out or to a cache.

With a C++ kernel alone, no version counter would tell autograd that a tensor it saved has been
written. Not used in inference mode, which counts no versions.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import forward_ad

from rope_ext._calling import check_may_be_written
from rope_ext._copies import Arguments, register_copies
from rope_ext._derivatives import is_dual

rope = torch.ops.rope

_WRITING = torch.library.Library("rope", "IMPL")
_BELOW_AUTOGRAD = {"dispatch_key": "ADInplaceOrView", "with_keyset": True}


def register_writes() -> None:
    in_place = "the functions of rope_ext differentiate in place"
    cached = "what a cache keeps has none"
    for name, overload, instead in (
        ("apply_rotary_", rope.apply_rotary_.default, in_place),
        ("apply_rotary_qk_", rope.apply_rotary_qk_.default, in_place),
        ("apply_rotary_qk_at_", rope.apply_rotary_qk_at_.default, in_place),
        ("apply_rotary.out", rope.apply_rotary.out, "rotate without out"),
        ("apply_rotary_qk.out", rope.apply_rotary_qk.out, "rotate without out"),
        ("apply_rotary_qk_append_kv_", rope.apply_rotary_qk_append_kv_.default, cached),
        ("apply_rotary_mla_append_", rope.apply_rotary_mla_append_.default, cached),
    ):
        _WRITING.impl(name, _writing_kernel(overload, instead), **_BELOW_AUTOGRAD)
        register_copies(_WRITING, name, overload)


def _writing_kernel(overload: Any, instead: str) -> Callable[..., None]:
    """Refuses tensors that require grad, runs the operator, and counts up the written versions."""
    arguments = Arguments(overload)
    op = arguments.op

    def kernel(keyset: Any, *args: Any, **options: Any) -> None:
        written = arguments.written(args, options)
        if not torch.is_inference_mode_enabled():
            check_may_be_written(overload, written)
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args, *options.values()):
            named = arguments.named(args, options)
            name = next(name for name, x in named if x.requires_grad)
            raise RuntimeError(
                f"{op}: expected {name} to need no gradient ({instead}), got a tensor that "
                "requires grad"
            )
        transformed = torch._C._are_functorch_transforms_active()
        if (transformed or forward_ad._current_level >= 0) and is_dual(*args, *options.values()):
            raise RuntimeError(
                f"{op}: expected tensors without tangents ({instead}), got one that "
                "forward-mode differentiation has given one"
            )
        with torch._C._AutoDispatchBelowADInplaceOrView():
            overload.redispatch(keyset & torch._C._after_ADInplaceOrView_keyset, *args, **options)
        torch.autograd.graph.increment_version(written)

    return kernel
