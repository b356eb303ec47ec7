"""Models for the tests of patch: a small Llama, and modules of generated files."""

import itertools
import sys
import textwrap
import types

import torch
from torch import nn

# Of support.small_llama.
TOKENS = torch.randint(0, 96, (2, 40), generator=torch.Generator().manual_seed(1))
_numbers = itertools.count()


def rotations_of_rope_ext(model, *args, **kwargs):
    """The number of calls of rope_ext's operators in a forward pass."""
    with torch.no_grad(), torch.profiler.profile() as profile:
        model(*args, **kwargs)
    return sum(e.count for e in profile.key_averages() if e.key.startswith("rope::"))


def rotate_half(x):
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((-x2, x1), dim=-1)


def standard(q, k, cos, sin, unsqueeze_dim=1):
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin


def names_for_copies():
    """The names that patch has added to the globals of files."""
    return {
        (file, name)
        for file, module in list(sys.modules.items())
        for name in getattr(module, "__dict__", ())
        if name.startswith("_rope_ext_")
    }


def file_of(source, **names):
    """A Python module from source, without a file."""
    file = types.ModuleType(f"file_of_a_model_{next(_numbers)}")
    vars(file).update(names, nn=nn)
    sys.modules[file.__name__] = file
    exec(compile(source, "<file of a model>", "exec"), vars(file))
    return file


ATTENTION = """
class Attention(nn.Module):
    scale = 1
    def forward(self, q, k, cos, sin, **kwargs):
        return apply_rotary_pos_emb(q, k, cos, sin)
"""


CALL = "q, k = apply_rotary_pos_emb(q, k, cos, sin)"


def derived(*lines, before="", head="def forward(self, q, k, cos, sin):", base="Attention"):
    """The source of a class Derived whose method has these lines."""
    method = "\n".join([head, *("    " + line for line in lines)])
    return f"\n{before}\nclass Derived({base}):\n" + textwrap.indent(method, "    ")


def model_with(rotation, extra=""):
    """A file whose Attention, and `extra`, call `rotation` as apply_rotary_pos_emb."""
    return file_of(ATTENTION + extra, apply_rotary_pos_emb=rotation)


def arguments():
    generator = torch.Generator().manual_seed(2)
    shapes = ((2, 4, 5, 8), (2, 2, 5, 8), (2, 5, 8), (2, 5, 8))
    return [torch.randn(shape, generator=generator) for shape in shapes]
