"""The rotations of transformers models: recognized, and right in every layout."""

import pytest
import torch
from rotating_models import rotate_half
from torch import Tensor

pytest.importorskip("transformers", reason="pip install 'rope_ext[test]'")
from rope_ext.integrations.patching.pairs import ALL_PAIRS
from rope_ext.integrations.patching.probes import Numbers
from rope_ext.integrations.patching.recognition import _call
from rope_ext.integrations.transformers import forms

FORMS = (*forms._FORMS, *forms._METHOD_FORMS)
# The first of each kind of columns, on which the tables of a rotation depend.
PAIRS = tuple({pairs.columns: pairs for pairs in reversed(ALL_PAIRS)}.values())


def spread(x):
    """x with other numbers between its elements: no stride is 1."""
    return torch.stack((x, x + 1), -1)[..., 0]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.fill.__name__)
def test_strides_of_arguments_do_not_matter(form):
    compared = 0
    for pairs in PAIRS:
        rotate = form.fill(pairs)
        for arguments, keywords in form.probes(Numbers(torch.float32)):
            expected = _call(rotate, (arguments, keywords))
            if expected is None:  # these pairs need other tables
                continue
            apart = [spread(a) if isinstance(a, Tensor) and a.dim() else a for a in arguments]
            results = rotate(*apart, **keywords)
            results = results if isinstance(results, tuple) else (results,)
            assert all(
                a is b is None or torch.equal(a, b) for a, b in zip(results, expected, strict=True)
            )
            compared += 1
    assert compared


def rotate(x, cos, sin):
    return x * cos + rotate_half(x) * sin


# The functions of transformers releases from 5.0 on, rewritten.


def interleaved_in_halves_out(q, k, cos, sin, position_ids=None, unsqueeze_dim=1):
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    q, k = (torch.cat((x[..., ::2], x[..., 1::2]), -1) for x in (q, k))
    return rotate(q, cos, sin), rotate(k, cos, sin)


def by_sections(q, k, cos, sin, mrope_section, unsqueeze_dim=1):
    ends = torch.tensor(2 * mrope_section).cumsum(0)
    axis = torch.bucketize(torch.arange(q.shape[-1]), ends, right=True) % 3
    channels = torch.arange(q.shape[-1])
    cos, sin = (x[axis, :, :, channels].movedim(0, -1).unsqueeze(unsqueeze_dim) for x in (cos, sin))
    return rotate(q, cos, sin), rotate(k, cos, sin)


def longer_tables(x, cos, sin):
    length = x.shape[-2]
    return rotate(x, cos[:, :, :length], sin[:, :, :length])


def from_angles(tensor, freqs):
    cos, sin = freqs.cos().repeat(1, 2).unsqueeze(1), freqs.sin().repeat(1, 2).unsqueeze(1)
    return rotate(tensor.float(), cos.float(), sin.float()).to(tensor.dtype)


EARLIER = {
    interleaved_in_halves_out: "interleaved in, halves out, one angle a channel",
    by_sections: "half-split; a section for an axis",
    longer_tables: "half-split; longer tables",
    from_angles: "half-split, one angle a pair; from angles",
}


@pytest.mark.parametrize("function", EARLIER, ids=lambda function: function.__name__)
def test_rotations_of_earlier_releases_are_recognized(function):
    assert forms.recognize(function).convention == EARLIER[function]
