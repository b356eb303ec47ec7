"""Every operator once, against plain torch: shows that a wheel works under the installed torch.

    python tests/smoke.py [TORCH_VERSION]

Needs nothing but torch and rope_ext. Fails if torch is not of the given version.
"""

import sys

import torch

import rope_ext

B, S, H, D = 2, 7, 3, 16
P = D // 2
START = 1_000_000


def rotate(x, cos, sin):
    """The half-split rotation, x [B, S, H, D] by cos, sin [S, P], in float64."""
    x1, x2 = x.double().chunk(2, dim=-1)
    cos, sin = cos.double()[:, None, :], sin.double()[:, None, :]
    return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], dim=-1)


def expect_close(got, expected, tolerance=1e-6):
    torch.testing.assert_close(got.double(), expected.double(), rtol=tolerance, atol=tolerance)


def main():
    if sys.argv[1:] and torch.__version__.split("+")[0] != sys.argv[1]:
        raise SystemExit(f"expected torch {sys.argv[1]}, found {torch.__version__}")
    ops = torch.ops.rope
    torch.manual_seed(0)

    inv_freq, _ = rope_ext.frequencies.default(D)
    position_ids = torch.arange(START, START + S)
    cos, sin = ops.cos_sin_cache(inv_freq, S, start=START)
    angle = position_ids.double()[:, None] * inv_freq.double()
    expect_close(cos, angle.cos())
    expect_close(sin, angle.sin())
    for a, b in zip(ops.cos_sin(inv_freq, position_ids), (cos, sin), strict=True):
        assert torch.equal(a, b)

    q, k = torch.randn(B, S, H, D), torch.randn(B, S, 1, D)
    expected_q, expected_k = rotate(q, cos, sin), rotate(k, cos, sin)
    expect_close(ops.apply_rotary(q, cos, sin), expected_q)
    got_q, got_k = ops.apply_rotary_qk(q, k, cos, sin, torch.arange(S))
    expect_close(got_q, expected_q)
    expect_close(got_k, expected_k)
    expect_close(ops.apply_rotary(got_q, cos, sin, inverse=True), q)
    got_q, got_k = q.clone(), k.clone()
    ops.apply_rotary_(got_q, cos, sin)
    expect_close(got_q, expected_q)
    got_q = q.clone()
    ops.apply_rotary_qk_(got_q, got_k, cos, sin)
    expect_close(got_q, expected_q)
    expect_close(got_k, expected_k)

    # Gradients to q, and through cos and sin to inv_freq.
    leaves = [q.clone().requires_grad_(), inv_freq.clone().requires_grad_()]
    position_ids = torch.arange(S)
    cos, sin = rope_ext.cos_sin(leaves[1], position_ids)
    got = torch.autograd.grad((rope_ext.apply_rotary(leaves[0], cos, sin) * q).sum(), leaves)
    leaves = [leaf.detach().double().requires_grad_() for leaf in leaves]
    angle = position_ids.double()[:, None] * leaves[1]
    expected = torch.autograd.grad((rotate(leaves[0], angle.cos(), angle.sin()) * q).sum(), leaves)
    for a, b in zip(got, expected, strict=True):
        expect_close(a, b, tolerance=1e-5)

    print(f"rope_ext {rope_ext.__version__} works under torch {torch.__version__}")
    print(f"  {rope_ext._C.build_info()}")


if __name__ == "__main__":
    main()
