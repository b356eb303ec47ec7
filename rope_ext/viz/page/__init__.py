"""The page to explore a rotation: one HTML file, which loads nothing else.

page.html       the text
page.css        light and dark, wide and narrow
frequencies.js  the formulas of rope_ext: frequencies, angles, scores
drawing.js      the pair, the tables, the two charts, and pictures of them to save
page.js         the controls and their effects
"""

import json
from pathlib import Path
from typing import Any

import torch

from rope_ext.viz.model_rotation import LLAMA3, ModelRotation
from rope_ext.viz.published import CONFIGS

FOLDER = Path(__file__).parent
SCRIPTS = ("frequencies.js", "drawing.js", "page.js")
METHODS = ("default", "linear", "ntk", "yarn", "llama3")  # implemented by frequencies.js
YARN = ("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate")
CHANNELS = range(4, 513)  # that can rotate on the page


def page(model: ModelRotation | None = None) -> str:
    """The page as text.

    Args:
        model: the rotation shown at first. None: that of a model like Llama 3.

    Raises:
        ValueError: for a model with fewer than 4 or more than 512 channels that rotate.
    """
    if model and 2 * model.pairs not in CHANNELS:
        raise ValueError(f"viz: expected rotary_dim to be 4 to 512, got {2 * model.pairs}")
    models = {"the config": model} if model else {"like Llama 3": ModelRotation.of()}
    models |= {name: ModelRotation.of(config) for name, config in CONFIGS.items()}
    data = {**two_vectors(), "models": [{"name": name, **data_of(models[name])} for name in models]}
    parts = {
        "style": (FOLDER / "page.css").read_text(encoding="utf-8"),
        "data": json.dumps(data, sort_keys=True).replace("<", "\\u003c"),  # no end of the script
        "script": "\n".join((FOLDER / name).read_text(encoding="utf-8") for name in SCRIPTS),
    }
    text = (FOLDER / "page.html").read_text(encoding="utf-8")
    for name, part in parts.items():
        text = text.replace(f"{{{{ {name} }}}}", part)
    return text


def two_vectors() -> dict[str, list[float]]:
    """A query and a similar key, of random numbers, for the scores."""
    generator = torch.Generator().manual_seed(0)
    q, other = torch.randn(2, CHANNELS[-1], generator=generator).double()
    vectors = {"q": q, "k": 0.8 * q + 0.6 * other}
    return {name: x.mul(100).round().div(100).tolist() for name, x in vectors.items()}


def data_of(model: ModelRotation) -> dict[str, Any]:
    """The numbers of a model, for the scripts."""
    scaling = model.scaling
    own = {} if model.rope_type in METHODS else {"inv_freq": model.inv_freq.tolist()}
    return {
        "rotary_dim": 2 * model.pairs,
        "base": model.base,
        "trained": model.trained,
        "extended": model.extended,
        "factor": model.factor,
        "rope_type": model.rope_type,
        "attention_scaling": model.attention_scaling,
        "yarn": {key: scaling[key] for key in YARN if key in scaling},
        "llama3": {key: scaling.get(key, default) for key, default in LLAMA3.items()},
        **own,
    }
