"""Frequencies: one function a method, each returning ``(inv_freq, attention_scaling)``.

``inv_freq`` is float32 [P] in radians per token, the value that models were trained with;
``attention_scaling`` is the factor that the method multiplies into cos and sin, so that scores of q
and k carry its square. Every function is evaluated in float32 in the order of transformers, so that
the bits are those of its ``ROPE_INIT_FUNCTIONS`` on the same device.

A head has at most 65,536 channels, a context at most 2^31 - 1 tokens, and other numbers, where they
are not 0, are from 1e-15 to 1e15 in size, so that float32 holds what they make together. What is
outside, or of another kind, raises a ValueError before memory is taken.

The files::

    basic.py     default, partial, proportional: which channels rotate
    context.py   linear, yarn, longrope, llama3: for contexts longer than those of the training
    ntk_aware.py ntk, ntk_alpha, dynamic_ntk: the same by another base
    spatial.py   axial, pixel, constant: images, volumes and learned frequencies
    decay.py     xpos: rotation with a decay, for which q and k need tables of their own
    scaling.py   from_scaling: all of these from a dict in the terms of Hugging Face
    config.py    from_config: what a Hugging Face config asks for
    entries.py   the entries of a config, each read and checked
    families.py  what a config.json leaves unsaid, by model_type
    bounds.py    what arguments and entries have to be
"""

from rope_ext.frequencies.basic import default, partial, proportional
from rope_ext.frequencies.config import from_config
from rope_ext.frequencies.context import linear, llama3, longrope, yarn
from rope_ext.frequencies.decay import xpos
from rope_ext.frequencies.ntk_aware import dynamic_ntk, ntk, ntk_alpha
from rope_ext.frequencies.scaling import from_scaling
from rope_ext.frequencies.spatial import axial, constant, pixel

__all__ = [
    "axial",
    "constant",
    "default",
    "dynamic_ntk",
    "from_config",
    "from_scaling",
    "linear",
    "llama3",
    "longrope",
    "ntk",
    "ntk_alpha",
    "partial",
    "pixel",
    "proportional",
    "xpos",
    "yarn",
]
