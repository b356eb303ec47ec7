"""What PyTorch needs to know about an operator besides its kernels, one mechanism a file.

Each file reads the records (record.py) and schemas of the operators; none names an operator.

record.py       the record of an operator, and what follows from its schema
autograd.py     derivatives, backward and forward
writes.py       version counters, and errors for tensors that can't be written
negative_and_zero_tensors.py    tensors whose values are not those in memory
fakes.py        shapes, dtypes and strides of results, and the devices of arguments
vmap.py         one call for all samples
sharding.py     how an operator may be sharded: named axes
placements.py   placements of the DTensors of a call
dtensor.py      calls on local tensors; what placements decide is kept
flops.py        formulas for torch.utils.flop_counter
calls.py        calls that skip the Autograd kernels if nothing is differentiated
direct.py       calls that skip the dispatcher
fallback.py     devices without kernels: plain PyTorch
import_hook.py  registration with modules of PyTorch that are imported later

Only rope_ext/_torch_private.py uses private names of PyTorch.
"""

from collections.abc import Sequence
from functools import cache

from rope_ext._engine.autograd import register_autograd
from rope_ext._engine.fakes import register_fakes
from rope_ext._engine.fallback import register_fallback
from rope_ext._engine.flops import register_flops
from rope_ext._engine.import_hook import on_import
from rope_ext._engine.negative_and_zero_tensors import register_negative_and_zero_tensors
from rope_ext._engine.record import Operator
from rope_ext._engine.vmap import register_vmap_rules
from rope_ext._engine.writes import register_writes


@cache  # PyTorch allows one registration
def register(operators: Sequence[Operator]) -> None:
    """Registers the operators with every mechanism, when the package is imported."""
    register_fallback(operators)
    register_fakes(operators)
    register_autograd(operators)
    register_writes(operators)
    register_negative_and_zero_tensors(operators)
    register_vmap_rules(operators)
    on_import("torch.utils.flop_counter", lambda: register_flops(operators))
    on_import("torch.distributed.tensor", lambda: _register_dtensors(operators))


def _register_dtensors(operators: Sequence[Operator]) -> None:
    from rope_ext._engine.dtensor import register_dtensors

    register_dtensors(operators)
