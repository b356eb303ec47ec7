"""Every private name of PyTorch that rope_ext uses, each under a public name of this file.

If a release of PyTorch renames one of these, only this file changes.
"""

from typing import Any

import torch
from torch import Tensor
from torch._functorch.autograd_function import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction

# Autograd
any_requires_grad = torch._C._any_requires_grad
below_autograd = torch._C._AutoDispatchBelowAutograd
keys_below_autograd = torch._C._after_autograd_keyset
below_versions = torch._C._AutoDispatchBelowADInplaceOrView
keys_below_versions = torch._C._after_ADInplaceOrView_keyset

# torch.func and forward-mode differentiation
transforms_active = torch._C._are_functorch_transforms_active
is_of_a_transform = torch._C._functorch.is_functorch_wrapped_tensor
single_level = enable_single_level_autograd_function
SingleLevelFunction = _SingleLevelFunction
is_forward_mode_enabled = forward_ad._is_fwd_grad_enabled
set_forward_mode_enabled = forward_ad._set_fwd_grad_enabled
# With level 0, the only one. Not forward_ad.unpack_dual: it reads a counter that compiled graphs
# lack.
unpack_dual = torch._VF._unpack_dual

is_zero_tensor = Tensor._is_zerotensor

# Registrations of operators
has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
privateuse1_name = torch._C._get_privateuse1_backend_name
registered_operators = torch._C._dispatch_get_all_op_names
registrations_of = torch._C._dispatch_dump
define_namespace = torch._C._dispatch_library

_OPTIONAL_TENSOR = torch._C.OptionalType(torch._C.TensorType.get())


def exchange_api_of(type_of_tensors: type) -> Any:
    """DLPack's exchange API of a type, a capsule; None: it has none."""
    return getattr(type_of_tensors, "__dlpack_c_exchange_api__", None)


def in_forward_mode() -> bool:
    """Whether this is within forward_ad.dual_level()."""
    return forward_ad._current_level >= 0


# Direct calls
count_versions = torch._C._increment_version
# If one of these is true, a call has to go through the dispatcher.
needs_dispatcher = (
    transforms_active,
    torch._C._is_torch_function_mode_enabled,
    torch._C._len_torch_dispatch_stack,
    torch._C._is_tracing,
    torch._C._autograd._profiler_enabled,
)
# Where in_forward_mode looks: a dictionary and a name in it. The level is below 0 outside.
forward_level = (vars(forward_ad), "_current_level")
version_of = Tensor._version


def is_dual(*values: Any) -> bool:
    """Whether one of the tensors has a tangent of forward-mode differentiation."""
    return any(isinstance(x, Tensor) and unpack_dual(x, 0)[1] is not None for x in values)


def keyset_of(dispatch_key: str) -> Any:
    return torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, dispatch_key))


def keys_after(dispatch_key: str) -> Any:
    """The dispatch keys that come after this one."""
    return torch._C._dispatch_keyset_full_after(getattr(torch._C.DispatchKey, dispatch_key))


def schema_of(overload: Any) -> Any:
    return overload._schema


def base_of(x: Tensor) -> Tensor:
    """The tensor that x is a view of, or x."""
    return x._base if x._is_view() else x


def is_unmodifiable_view(x: Tensor) -> bool:
    """Whether x is a view that autograd does not allow to be modified in place."""
    default = torch._C._autograd.CreationMeta.DEFAULT
    return x._is_view() and torch._C._autograd._get_creation_meta(x) != default


def is_tensor(argument: Any) -> bool:
    """Whether an argument of a schema is a Tensor or a Tensor?."""
    return argument.type.isSubtypeOf(_OPTIONAL_TENSOR)


def name_of(operator: Any) -> str:
    """The name of an overload, or of an operator with one overload: rope::apply_rotary.out."""
    if isinstance(operator, torch._ops.OpOverloadPacket):
        return operator._qualified_op_name
    overload = operator._overloadname
    return operator._schema.name + ("" if overload == "default" else "." + overload)


def allows_implicit_replication(dtensor: Any) -> bool:
    """Whether torch.distributed.tensor.experimental.implicit_replication() is active."""
    return getattr(dtensor._op_dispatcher, "_allow_implicit_replication", False)


def distribution_of(dtensor: Any) -> Any:
    """All of a DTensor but its local tensor."""
    return dtensor._spec


def distributed_as(distribution: Any, local: Tensor, dtensor: Any) -> Any:
    """A DTensor without gradient, in a tenth of the time of DTensor.from_local."""
    return dtensor(local, distribution, requires_grad=False)
