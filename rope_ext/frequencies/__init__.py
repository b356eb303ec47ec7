"""Frequencies: one function for each method, which returns ``(inv_freq, attention_scaling)``.

``inv_freq`` is float32 [P] in radians per token. ``attention_scaling`` is a factor on cos and sin,
so the scores of q and k are multiplied by its square. Every function computes in float32 in the
order of transformers' ``ROPE_INIT_FUNCTIONS``, with the same bits on the same device.

A head has at most 65,536 channels and a context at most 2^31 - 1 tokens. The magnitudes of other
numbers are 0 or from 1e-15 to 1e15, so that float32 holds their products. Other values raise a
ValueError before memory is allocated.

The files::

    basic.py     default, partial, proportional: which channels rotate
    context.py   linear, yarn, longrope, llama3: for contexts longer than those of the training
    ntk_aware.py ntk, ntk_alpha, dynamic_ntk: for such contexts too, by a larger base
    spatial.py   axial, pixel, constant: images, volumes and learned frequencies
    decay.py     xpos: rotation with a decay, for which q and k need different tables
    scaling.py   from_scaling: all of these from a dict in the terms of Hugging Face
    config.py    from_config: the frequencies of a Hugging Face config
    entries.py   reads and checks the entries of a config
    families.py  defaults that a config.json omits, by model_type
    bounds.py    bounds of arguments and entries
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
