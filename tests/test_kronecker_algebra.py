"""Kronecker products: what applies, decomposes and inverts factors against dense matrices (K1 to K7, X2)."""

import math

import pytest
import torch
from torch import Tensor

from kfac_fx import spectrum
from kfac_fx.linalg import mean_eigenvalue
from kfac_fx.methods.base import two_sided
from kfac_fx.methods.damping import paired_dampings, scale
from kfac_fx.methods.eigenbasis import outer, solved_in_basis
from kfac_fx.spectrum import eigendecompositions, kronecker_sum_solve, pseudo_inverses

D_OUT, D_IN = 4, 6


def spd(*shape: int, rank: int | None = None) -> Tensor:
    """A random positive definite batch, or semi-definite of a rank: [*shape, shape[-1]]."""
    rows = torch.randn(*shape, rank or 2 * shape[-1], dtype=torch.float64)
    return rows @ rows.mT / rows.shape[-1]


def pair() -> tuple[Tensor, Tensor]:
    """(A, G) of one group."""
    return spd(1, D_IN), spd(1, D_OUT)


def gradient() -> Tensor:
    return torch.randn(1, D_OUT, D_IN, dtype=torch.float64)


def error(found: Tensor, wanted: Tensor) -> float:
    assert found.shape == wanted.shape and found.dtype == wanted.dtype
    return float((found - wanted).norm() / wanted.norm())


def eye_like(factor: Tensor) -> Tensor:
    return torch.eye(factor.shape[-1], dtype=factor.dtype).expand_as(factor).clone()


def decomposition(a: Tensor, g: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Bases of both, and the eigenvalues of G (x) A in the gradient's shape."""
    eigen = eigendecompositions([a, g], last=[eye_like(a), eye_like(g)])
    assert eigen.kept_last == 0
    return {"A_basis": eigen.bases[0], "G_basis": eigen.bases[1]}, outer(eigen.values[1], eigen.values[0])


@pytest.mark.parametrize("transposed", [False, True])
def test_k1_two_sided_products_are_those_with_the_kronecker_product(transposed: bool) -> None:
    (a, g), x = pair(), gradient()
    dense = torch.kron(g[0], a[0]) @ x.flatten()
    x = x.mT.contiguous().mT if transposed else x
    found = two_sided(g, x, a)
    assert error(found.flatten(), dense) < 1e-12
    assert found.stride() == x.stride()
    for other in (a + torch.triu(a), a.diagonal(dim1=1, dim2=2)[0]):
        columns = other[0].mT.contiguous() if other.dim() == 3 else other.diag()
        expected = torch.kron(g[0], columns) @ x.flatten()
        assert error(two_sided(g, x, other).flatten(), expected) < 1e-12
        assert error(two_sided(g, x, other).flatten(), dense) > 1e-2
    lopsided = g + torch.triu(g)
    expected = torch.kron(lopsided[0].contiguous(), a[0]) @ x.flatten()
    assert error(two_sided(lopsided, x, a).flatten(), expected) < 1e-12


def test_k2_the_trace_is_the_product_of_both_mean_eigenvalues() -> None:
    a, g = pair()
    found = mean_eigenvalue(a) * mean_eigenvalue(g) * D_IN * D_OUT
    assert error(found[0], torch.kron(g[0], a[0]).trace()) < 1e-12


def test_k3_the_eigenvalues_have_the_norm_of_the_kronecker_product() -> None:
    a, g = pair()
    assert error(decomposition(a, g)[1].norm(), torch.kron(g[0], a[0]).norm()) < 1e-12


def test_k4_the_eigenvalues_have_the_determinant_of_the_kronecker_product() -> None:
    a, g = pair()
    assert error(decomposition(a, g)[1].log().sum(), torch.kron(g[0], a[0]).logdet()) < 1e-12


@pytest.mark.parametrize("damping", [1e-4, 1e-2, 10.0])
def test_k5_solving_in_the_eigenbasis_is_the_dense_damped_inverse(damping: float) -> None:
    (a, g), x = pair(), gradient()
    state, values = decomposition(a, g)
    block = torch.kron(g[0], a[0]) + damping * torch.eye(D_IN * D_OUT, dtype=torch.float64)
    dense = torch.linalg.solve(block, x.flatten())
    assert error(solved_in_basis(state, x, values + damping).flatten(), dense) < 1e-10


def added(rule: str, damping: float, a: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    return paired_dampings(rule, damping, scale(rule, a), scale(rule, g))


def test_k6_factored_damping_adds_lambda_and_two_cross_terms() -> None:
    (a, g), damping = pair(), 0.3
    (to_a,), (to_g,) = added("factored", damping, a, g)
    pi = math.sqrt(a[0].trace() / D_IN / (g[0].trace() / D_OUT))
    eye_a, eye_g = eye_like(a)[0], eye_like(g)[0]
    residual = torch.kron(g[0] + to_g * eye_g, a[0] + to_a * eye_a) - torch.kron(g[0], a[0])
    wanted = damping * torch.eye(D_IN * D_OUT, dtype=torch.float64)
    wanted = wanted + pi * math.sqrt(damping) * torch.kron(g[0], eye_a)
    wanted = wanted + math.sqrt(damping) / pi * torch.kron(eye_g, a[0])
    assert error(residual, wanted) < 1e-12


def direction(rule: str, a: Tensor, g: Tensor, x: Tensor) -> Tensor:
    to_a, to_g = added(rule, 0.1, a, g)
    return two_sided(
        torch.linalg.inv(g + to_g[:, None, None] * eye_like(g)),
        x,
        torch.linalg.inv(a + to_a[:, None, None] * eye_like(a)),
    )


@pytest.mark.parametrize("share", [1e-3, 0.5, 40.0])
def test_k7_only_the_trace_pi_does_not_see_how_a_constant_is_split(share: float) -> None:
    (a, g), x = pair(), gradient()
    errors = {
        rule: error(direction(rule, share * a, g / share, x), direction(rule, a, g, x))
        for rule in ("factored", "sqrt", "full")
    }
    assert errors["factored"] < 1e-10
    assert errors["sqrt"] > 1e-2 and errors["full"] > 1e-2


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("batch", [(), (3,)])
def test_x2_the_sum_of_two_kronecker_products_is_solved_as_the_dense_matrix(
    sign: float, batch: tuple[int, ...]
) -> None:
    a, b = spd(*batch, D_IN), spd(*batch, D_OUT)
    c, d = 0.1 * spd(*batch, D_IN, rank=2), 0.1 * spd(*batch, D_OUT, rank=3)
    right = torch.randn(*batch, D_OUT, D_IN, dtype=torch.float64)
    found = kronecker_sum_solve(right, (b, a), (d, c), sign=sign)
    shape = (-1, D_OUT, D_OUT), (-1, D_IN, D_IN)
    parts = [m.reshape(shape[i % 2]) for i, m in enumerate((b, a, d, c))]
    for one, x, *factors in zip(
        found.reshape(-1, D_OUT, D_IN), right.reshape(-1, D_OUT, D_IN), *parts, strict=True
    ):
        block = torch.kron(factors[0], factors[1]) + sign * torch.kron(factors[2], factors[3])
        assert error(one.flatten(), torch.linalg.solve(block, x.flatten())) < 1e-8
        assert error(one.flatten(), torch.linalg.solve(torch.kron(*factors[:2]), x.flatten())) > 1e-3


def test_pseudo_inverses_are_those_of_torch_and_one_without_curvature_is_zero() -> None:
    factors = [spd(2, 5, rank=3), spd(1, 4), torch.zeros(1, 4, 4, dtype=torch.float64)]
    result = pseudo_inverses(factors, last=[eye_like(f) for f in factors])
    for found, factor in zip(result.inverses[:2], factors, strict=False):
        assert error(found, torch.linalg.pinv(factor, rtol=1e-10, hermitian=True)) < 1e-10
    assert torch.equal(result.inverses[2], factors[2]) and result.kept_last == 0


def test_a_float32_factor_of_low_rank_does_not_invert_its_rounding() -> None:
    factor = spd(1, 30, rank=5).float()
    (found,) = pseudo_inverses([factor], last=[eye_like(factor)]).inverses
    wanted = torch.linalg.pinv(factor.double(), rtol=1e-4, hermitian=True)
    assert error(found.double(), wanted) < 1e-3


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_factor_that_is_not_finite_keeps_its_basis_and_harms_no_other(poison: float) -> None:
    factor = spd(2, 3)
    factor[1, 0, 1] = poison
    last = torch.linalg.qr(torch.randn(2, 3, 3, dtype=torch.float64))[0]
    eigen = eigendecompositions([factor], last=[last])
    assert eigen.kept_last == 1 and torch.equal(eigen.bases[0][1], last[1])
    rebuilt = (eigen.bases[0][0] * eigen.values[0][0]) @ eigen.bases[0][0].T
    assert error(rebuilt, factor[0]) < 1e-12
    assert torch.isnan(eigen.values[0][1]).all()
    inverses = pseudo_inverses([factor], last=[last])
    assert inverses.kept_last == 1 and torch.equal(inverses.inverses[0][1], last[1])


def test_a_matrix_that_lapack_gives_up_keeps_its_basis_with_eigenvalues_in_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    good, hard = spd(1, 3), spd(1, 3)
    last = torch.linalg.qr(torch.randn(2, 3, 3, dtype=torch.float64))[0]
    plain = torch.linalg.eigh

    def eigh(matrices: Tensor) -> object:
        if any(torch.allclose(matrix, hard[0]) for matrix in matrices):
            raise torch.linalg.LinAlgError("no convergence")
        return plain(matrices)

    monkeypatch.setattr(spectrum.torch.linalg, "eigh", eigh)
    eigen = eigendecompositions([torch.cat([good, hard])], last=[last])
    assert eigen.kept_last == 1 and torch.equal(eigen.bases[0][1], last[1])
    assert error(eigen.values[0][1], (last[1].T @ hard[0] @ last[1]).diagonal()) < 1e-12
    assert error(eigen.values[0][0], plain(good)[0][0]) < 1e-12


def test_rounding_below_zero_is_clamped() -> None:
    factor = spd(1, 6, rank=1)
    assert torch.linalg.eigvalsh(factor).min() < 0
    assert eigendecompositions([factor], last=[eye_like(factor)]).values[0].min() >= 0


def test_rounding_does_not_choose_the_basis_of_a_null_space() -> None:
    factor = spd(1, 6, rank=2)
    noise = torch.randn(1, 6, 6, dtype=torch.float64) * 1e-16
    other = factor + noise + noise.mT
    last = [eye_like(factor)]
    (one,), (two,) = (eigendecompositions([f], last=last).bases for f in (factor, other))
    assert error(one**2, two**2) < 1e-9
    plain = [torch.linalg.eigh(f).eigenvectors for f in (factor, other)]
    assert error(plain[0] ** 2, plain[1] ** 2) > 1e-2
    rotated = one.mT @ factor @ one
    assert error(rotated, torch.diag_embed(rotated.diagonal(dim1=1, dim2=2))) < 1e-12
