"""Damped inverses, the closed form of small blocks and the trace pi, against dense algebra of torch."""

import math

import pytest
import torch
from torch import Tensor

from kfac_fx.linalg import damped_inverses, join_orientations, mean_eigenvalue, pi_ratio, small_inverse
from kfac_fx.spectrum import dominant_eigenvalue

TOLERANCE = 1e-10


def spd(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """A random positive definite batch [*shape, shape[-1]]."""
    rows = torch.randn(*shape, 2 * shape[-1], dtype=dtype)
    return rows @ rows.mT / rows.shape[-1]


def identity_like(factor: Tensor) -> Tensor:
    return torch.eye(factor.shape[-1], dtype=factor.dtype).expand_as(factor).clone()


def test_inverses_of_mixed_sizes_equal_dense_inverses() -> None:
    factors = [spd(1, 4), spd(3, 2), spd(2, 4), spd(1, 1)]
    dampings = [torch.rand(len(factor), dtype=torch.float64) for factor in factors]
    result = damped_inverses(factors, dampings, last=[identity_like(factor) for factor in factors])
    for inverse, factor, damping in zip(result.inverses, factors, dampings, strict=True):
        expected = torch.linalg.inv(factor + damping[:, None, None] * identity_like(factor))
        assert (inverse - expected).norm() <= TOLERANCE * expected.norm()
    assert (result.retried, result.kept_last) == (0, 0)


def hard_for_float32() -> Tensor:
    """A float32 matrix that is positive definite, but whose Cholesky factorisation in float32 breaks down."""
    for seed in range(200):
        rows = torch.randn(30, 30, generator=torch.Generator().manual_seed(seed))
        basis = torch.linalg.qr(rows)[0]
        matrix = ((basis * torch.logspace(0, -8, 30)) @ basis.mT).unsqueeze(0)
        matrix = (matrix + matrix.mT) / 2
        breaks = int(torch.linalg.cholesky_ex(matrix)[1]) != 0
        if breaks and torch.linalg.eigvalsh(matrix.double()).min() > 0:
            return matrix
    raise AssertionError("no such matrix found")


def test_a_factor_that_float32_cannot_factorise_is_inverted_in_float64() -> None:
    hard, easy = hard_for_float32(), spd(1, 30, dtype=torch.float32)
    zero = torch.zeros(1)
    result = damped_inverses([hard, easy], [zero, zero], last=[identity_like(hard)] * 2)
    assert (result.retried, result.kept_last) == (1, 0)
    expected = torch.linalg.inv(hard.double())
    assert (result.inverses[0].double() - expected).norm() <= 1e-5 * expected.norm()
    assert (result.inverses[1] - torch.linalg.inv(easy)).norm() < 1e-4 * result.inverses[1].norm()


def test_a_matrix_that_is_not_positive_definite_keeps_its_last_inverse_and_is_counted() -> None:
    good, bad = spd(1, 3), -spd(1, 3)
    last = torch.full((1, 3, 3), 7.0, dtype=torch.float64)
    zero = torch.zeros(1, dtype=torch.float64)
    result = damped_inverses([good, bad], [zero, zero], last=[last, last])
    assert (result.inverses[0] - torch.linalg.inv(good)).norm() < TOLERANCE * 10
    assert torch.equal(result.inverses[1], last)
    assert (result.retried, result.kept_last) == (1, 1)


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_factor_that_is_not_finite_keeps_its_last_inverse(poison: float) -> None:
    factor = spd(2, 3)
    factor[1, 0, 0] = poison
    last = identity_like(factor)
    result = damped_inverses([factor], [torch.full((2,), 0.1, dtype=torch.float64)], last=[last])
    assert torch.equal(result.inverses[0][1], last[1])
    expected = torch.linalg.inv(factor[0] + 0.1 * torch.eye(3, dtype=torch.float64))
    assert (result.inverses[0][0] - expected).norm() < TOLERANCE * expected.norm()
    assert result.kept_last == 1


@pytest.mark.parametrize("k", [1, 2])
def test_small_blocks_equal_dense_inverses(k: int) -> None:
    blocks = spd(5, k)
    expected = torch.linalg.inv(blocks + 0.3 * torch.eye(k, dtype=torch.float64))
    assert (small_inverse(blocks, 0.3) - expected).norm() < TOLERANCE * expected.norm()


@pytest.mark.parametrize("k", [1, 2])
def test_a_block_without_curvature_and_damping_gives_no_step(k: int) -> None:
    assert torch.equal(small_inverse(torch.zeros(3, k, k), 0.0), torch.zeros(3, k, k))


def test_pi_is_the_root_of_the_ratio_of_mean_eigenvalues_and_one_where_that_has_no_meaning() -> None:
    a, g = spd(2, 4), spd(2, 3)
    ratio = torch.linalg.eigvalsh(a).mean(-1) / torch.linalg.eigvalsh(g).mean(-1)
    assert (pi_ratio(mean_eigenvalue(a), mean_eigenvalue(g)) - ratio.sqrt()).abs().max() < TOLERANCE
    zero, one, bad = torch.zeros(1), torch.ones(1), torch.full((1,), math.inf)
    for left, right in ((zero, one), (one, zero), (zero, zero), (bad, one), (one, bad)):
        assert torch.equal(pi_ratio(left, right), one)


def test_joined_orientations_keep_the_trace_and_are_the_partial_traces_of_the_sum() -> None:
    a, g, a_swapped, g_swapped = spd(1, 3), spd(1, 4), spd(1, 4), spd(1, 3)
    inner, outer = join_orientations(a, g, a_swapped, g_swapped)
    block = torch.kron(g[0], a[0]) + torch.kron(
        a_swapped[0], g_swapped[0]
    )  # [4 * 3, 4 * 3], output side slow
    split = block.reshape(4, 3, 4, 3)
    assert (inner[0] - torch.einsum("oioj->ij", split)).norm() < TOLERANCE * inner.norm()
    partial = torch.einsum("oipi->op", split) / block.trace()
    assert (outer[0] - partial).norm() < TOLERANCE * outer.norm()
    assert abs(torch.kron(outer[0], inner[0]).trace() - block.trace()) < TOLERANCE * block.trace()


SPECTRA = {
    "equal": torch.ones(40),
    "even": torch.linspace(0, 1, 40),
    "steep": torch.logspace(-8, 0, 40),
    "two nearly equal": torch.cat([torch.tensor([1.0, 1 - 1e-6]), torch.zeros(38)]),
    "many nearly equal": torch.linspace(1 - 1e-4, 1, 40),
}


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_largest_eigenvalue_by_squaring_is_that_of_torch_whatever_the_gap(
    name: str, dtype: torch.dtype
) -> None:
    basis = torch.linalg.qr(torch.randn(3, 40, 40, dtype=torch.float64)).Q
    sizes = torch.tensor([1e-20, 1.0, 1e20], dtype=torch.float64)
    matrices = ((basis * SPECTRA[name].double()) @ basis.mT * sizes[:, None, None]).to(dtype)
    matrices = (matrices + matrices.mT) / 2
    exact = torch.linalg.eigvalsh(matrices.double())[:, -1]
    found = dominant_eigenvalue(matrices)
    assert found.dtype is dtype
    rounding = torch.finfo(dtype).eps if dtype is torch.bfloat16 else 1e-6
    torch.testing.assert_close(found.double(), exact, rtol=rounding, atol=0.0)


def test_the_largest_eigenvalue_by_squaring_of_a_zero_matrix_is_zero() -> None:
    assert dominant_eigenvalue(torch.zeros(2, 3, 3)).tolist() == [0.0, 0.0]
