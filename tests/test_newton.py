"""Newton steps and power iteration: oracles N1-N6, N8, N10, N11 of methods.md section 15, and section 19."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kfac_fx import newton

GUARDS = ("frobenius", "spectral")


def spd(*, size: int, condition: float, batch: int = 1, seed: int = 0) -> Tensor:
    """Random matrices [batch, size, size] with eigenvalues from 1 / condition to 1."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(batch, size, size, generator=generator, dtype=torch.float64)
    basis = torch.linalg.qr(normal).Q
    eigenvalues = torch.logspace(0, -torch.log10(torch.tensor(condition)), size, dtype=torch.float64)
    return (basis * eigenvalues) @ basis.mT


def residual(matrices: Tensor, inverses: Tensor) -> Tensor:
    """I - M B."""
    return torch.eye(matrices.shape[-1], dtype=matrices.dtype) - matrices @ inverses


def frobenius(matrices: Tensor) -> float:
    return float(torch.linalg.matrix_norm(matrices).max())


def smallest_eigenvalue(matrices: Tensor) -> float:
    return float(torch.linalg.eigvalsh(newton.symmetrised(matrices)).min())


@pytest.mark.parametrize("guard", GUARDS)
def test_a_full_step_squares_the_error(guard: str) -> None:
    matrix = spd(size=12, condition=50)
    start = torch.linalg.inv(matrix + 1e-3 * spd(size=12, condition=5, seed=1))
    before = residual(matrix, start)
    assert frobenius(before) < 0.5
    after = residual(matrix, newton.newton_step(matrix, start, guard=guard))
    assert frobenius(after - before @ before) < 1e-12


@pytest.mark.parametrize("scale", [0.1, 3.5])
def test_a_damped_step_mixes_the_error_with_its_square(scale: float) -> None:
    matrix = spd(size=12, condition=50)
    start = scale * torch.linalg.inv(matrix + 0.05 * spd(size=12, condition=5, seed=1))
    before = residual(matrix, start)
    assert frobenius(before) > 1
    al = 1 / torch.linalg.matrix_norm(matrix @ start)
    after = residual(matrix, newton.newton_step(matrix, start, guard="frobenius"))
    assert frobenius(after - ((1 - al) * before + al * before @ before)) < 1e-12


def test_convergence_from_a_good_start_is_quadratic() -> None:
    matrix = spd(size=64, condition=100)
    inverse = torch.linalg.inv(matrix + 2e-4 * spd(size=64, condition=5, seed=1))
    norms = [frobenius(residual(matrix, inverse))]
    for _ in range(5):
        inverse = newton.newton_step(matrix, inverse, guard="frobenius")
        norms.append(frobenius(residual(matrix, inverse)))
    assert 0.01 < norms[0] < 0.5
    assert all(new <= max(1.1 * old**2, 1e-12) for old, new in zip(norms, norms[1:], strict=False)), norms
    assert norms[-1] < 1e-12


@pytest.mark.parametrize("guard", GUARDS)
def test_the_safeguard_converges_where_plain_newton_diverges(guard: str) -> None:
    matrix = spd(size=64, condition=100)
    start = 3.5 * torch.linalg.inv(matrix)
    plain = start
    for _ in range(6):
        plain = (2 * torch.eye(64, dtype=torch.float64) - plain @ matrix) @ plain
    assert frobenius(residual(matrix, plain)) > 1e3
    guarded, steps = start, 0
    while frobenius(residual(matrix, guarded)) >= 1:
        guarded = newton.newton_step(matrix, guarded, guard=guard)
        steps += 1
    assert steps <= 40
    guarded = newton.newton_inverse(matrix, guarded, steps=8, guard=guard)
    assert frobenius(residual(matrix, guarded)) < 1e-12


@pytest.mark.parametrize("guard", GUARDS)
@pytest.mark.parametrize("scale", [0.2, 4.0, 300.0])
def test_guarded_steps_stay_positive_definite(guard: str, scale: float) -> None:
    matrix = spd(size=24, condition=100, batch=3)
    inverse = scale * torch.linalg.inv(matrix + 0.1 * spd(size=24, condition=5, batch=3, seed=1))
    for _ in range(120):
        inverse = newton.symmetrised(newton.newton_step(matrix, inverse, guard=guard))
        assert smallest_eigenvalue(inverse) > 0
    assert frobenius(residual(matrix, inverse)) < 1e-11


def test_the_select_form_is_the_branch_form_bit_for_bit() -> None:
    matrices = spd(size=16, condition=30, batch=4)
    scales = torch.tensor([0.2, 1.05, 2.0, 5.0], dtype=torch.float64)[:, None, None]
    starts = scales * torch.linalg.inv(matrices)
    stepped = newton.newton_step(matrices, starts, guard="frobenius")
    eye, branches = torch.eye(16, dtype=torch.float64), set()
    for matrix, start, found in zip(matrices.split(1), starts.split(1), stepped.split(1), strict=True):
        product = start @ matrix
        if (eye - product).norm() >= 1:
            al = 1 / torch.linalg.vector_norm(product)
            expected = ((1 + al) * eye - al * product) @ start
        else:
            expected = (2 * eye - product) @ start
        branches.add(bool((eye - product).norm() >= 1))
        assert torch.equal(found, expected)
    assert branches == {True, False}


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_steps_after_an_exact_inverse_leave_a_power_of_the_first_error(steps: int) -> None:
    old = spd(size=32, condition=100)
    matrix = old + 1e-3 * spd(size=32, condition=5, seed=1)
    first = residual(matrix, torch.linalg.inv(old))
    assert frobenius(first) < 1
    found = newton.newton_inverse(matrix, torch.linalg.inv(old), steps=steps, guard="frobenius")
    expected = torch.linalg.matrix_power(first, 2**steps)
    assert frobenius(residual(matrix, found) - expected) < 1e-11
    norms = [float(torch.linalg.matrix_norm(e, ord=2)) for e in (residual(matrix, found), expected)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-3, abs=1e-12)


def rounded_to_tf32(values: Tensor) -> Tensor:
    """Mantissas of 10 bits."""
    mantissa, exponent = torch.frexp(values)
    return torch.ldexp((mantissa * 2**11).round() / 2**11, exponent)


def test_float32_reaches_its_floor_and_tf32_does_not() -> None:
    matrix = spd(size=64, condition=100)
    single = matrix.float()
    inverse = newton.newton_inverse(single, torch.linalg.inv(single), steps=3, guard="frobenius")
    assert frobenius(residual(matrix, inverse.double())) < 1e-3
    coarse, eye = torch.linalg.inv(single), torch.eye(64)
    for _ in range(3):
        product = rounded_to_tf32(coarse) @ rounded_to_tf32(single)
        coarse = rounded_to_tf32(2 * eye - product) @ rounded_to_tf32(coarse)
    assert frobenius(residual(matrix, coarse.double())) > 1e-2


def test_many_small_errors_stall_the_frobenius_guard_and_not_the_spectral_one() -> None:
    size = 256
    torch.manual_seed(0)
    noise = newton.symmetrised(torch.randn(1, size, size, dtype=torch.float64))
    error = 1.05 * noise / noise.norm()
    eye = torch.eye(size, dtype=torch.float64)
    start = (eye - error).contiguous()  # M = I
    matrix = eye.unsqueeze(0)
    stalled = residual(matrix, newton.newton_step(matrix, start, guard="frobenius"))
    squared = residual(matrix, newton.newton_step(matrix, start, guard="spectral"))
    assert frobenius(stalled) > 0.9
    assert frobenius(squared - error @ error) < 1e-12
    assert frobenius(squared) < 0.2


@pytest.mark.parametrize("size", [1, 2, 30, 200])
def test_the_spectral_bound_is_a_bound_and_at_most_a_quarter_too_large(size: int) -> None:
    torch.manual_seed(size)
    low_rank = torch.randn(5, size, 1) @ torch.randn(5, 1, size)
    matrices = torch.cat([torch.randn(5, size, size), low_rank, spd(size=size, condition=9).float()]).double()
    found, exact = newton.spectral_bound(matrices), torch.linalg.matrix_norm(matrices, ord=2)
    assert bool((found >= exact * (1 - 1e-12)).all()) and bool((found <= 1.25 * exact * (1 + 1e-12)).all())


def test_power_iteration_finds_the_largest_eigenvalue_from_below() -> None:
    torch.manual_seed(0)
    rows = torch.randn(50, 60, 60, dtype=torch.float64)
    matrices = rows.mT @ rows
    ratio = newton.top_eigenvalue(matrices) / torch.linalg.eigvalsh(matrices)[:, -1]
    assert float(ratio.min()) >= 0.9 and float(ratio.max()) <= 1 + 1e-12


def test_a_zero_matrix_gets_the_damping_floor() -> None:
    matrices = torch.stack([torch.zeros(4, 4), torch.eye(4)])
    damping = newton.relative_damping(matrices, relative=0.01, floor=1e-4)
    assert torch.allclose(damping, torch.tensor([1e-4, 1e-2]))
    assert float(newton.relative_damping(torch.zeros(4), relative=0.01, floor=1e-4)) == pytest.approx(1e-4)
    assert float(newton.relative_damping(torch.tensor([0.1, 0.5]), relative=0.01, floor=1e-4)) == (
        pytest.approx(5e-3)
    )


def power_from_ones(matrix: Tensor) -> float:
    vector = torch.ones(len(matrix), dtype=matrix.dtype)
    for _ in range(10):
        product = vector @ matrix
        vector = matrix @ (product / product.norm())
    return float(vector.norm())


def softmax_moment(logits: Tensor) -> Tensor:
    """G of an output layer under cross-entropy with random targets, normalised."""
    leaf = logits.clone().requires_grad_()
    targets = torch.randint(logits.shape[1], (len(logits),))
    (g,) = torch.autograd.grad(F.cross_entropy(leaf, targets), leaf)
    return (g.T @ g) / (g.T @ g).norm()


@pytest.mark.parametrize("classes", [10, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_start_survives_the_null_space_of_a_softmax_layer(classes: int, dtype: torch.dtype) -> None:
    moment = softmax_moment(torch.randn(64, classes, dtype=dtype))
    assert float((torch.ones(classes, dtype=dtype) @ moment).norm()) < 1e-5
    largest = float(torch.linalg.eigvalsh(moment.double())[-1])
    assert 0.9 * largest <= float(newton.top_eigenvalue(moment[None])) <= largest * (1 + 1e-5)


@pytest.mark.parametrize("classes", [10, 1000])
def test_a_start_of_ones_would_depend_on_rounding_and_ours_does_not(classes: int) -> None:
    moment = softmax_moment(torch.randn(64, classes, dtype=torch.float64))
    order = torch.randperm(classes)
    other = moment[order][:, order].contiguous()
    from_ones = [power_from_ones(matrix) for matrix in (moment, other)]
    ours = newton.top_eigenvalue(torch.stack([moment, other])).tolist()
    assert abs(from_ones[0] / from_ones[1] - 1) > 1e-10
    assert abs(ours[0] / ours[1] - 1) < 1e-12


@pytest.mark.parametrize("classes", [16, 1024])
def test_a_start_of_ones_fails_on_a_zero_initialised_head_and_ours_does_not(classes: int) -> None:
    targets = F.one_hot(torch.randint(classes, (64,)), classes).double()
    rows = 1 / classes - targets  # gradients at zero logits, whose sums are exactly zero
    moment = rows.T @ rows / 64
    assert not power_from_ones(moment) > 0
    largest = float(torch.linalg.eigvalsh(moment)[-1])
    assert 0.9 * largest <= float(newton.top_eigenvalue(moment[None])) <= largest * (1 + 1e-12)


def test_an_exact_inverse_of_a_singular_or_infinite_matrix_keeps_the_last_one() -> None:
    good, eye = spd(size=4, condition=10)[0], torch.eye(4, dtype=torch.float64)
    broken = torch.stack([good, torch.zeros_like(good), good * torch.inf, torch.full_like(good, torch.nan)])
    last = torch.stack([7 * eye] * 4)
    inverses, kept = newton.kept_where_not_finite(newton.exact_inverse(broken), last)
    assert kept.tolist() == [False, True, True, True]
    assert torch.allclose(inverses[0] @ good, eye)
    assert torch.equal(inverses[1:], last[1:])


def test_a_newton_step_from_a_matrix_that_is_not_finite_keeps_the_last_inverse_and_its_neighbours() -> None:
    matrices = torch.stack([torch.full((3, 3), torch.nan), torch.eye(3)])
    last = torch.stack([5 * torch.eye(3), 1.1 * torch.eye(3)])
    for guard in GUARDS:
        found = newton.newton_inverse(matrices, last, steps=1, guard=guard)
        inverses, kept = newton.kept_where_not_finite(found, last)
        assert kept.tolist() == [True, False] and torch.equal(inverses[0], last[0])
        assert torch.allclose(inverses[1], 0.99 * torch.eye(3))


@pytest.mark.parametrize("guard", GUARDS)
def test_a_step_whose_norm_overflows_is_not_finite_instead_of_no_step(guard: str) -> None:
    start = 1e25 * torch.eye(4)  # its product with the identity is finite, the square of that is not
    found = newton.newton_step(torch.eye(4)[None], start[None], guard=guard)
    assert not found.isfinite().all()


@pytest.mark.parametrize("guard", GUARDS)
def test_nothing_is_read_on_the_host(guard: str) -> None:
    matrices = torch.empty(2, 5, 5, device="meta")  # a host read of such a tensor raises
    damping = newton.relative_damping(matrices, relative=0.01, floor=1e-4)
    found = newton.newton_inverse(matrices, matrices, steps=2, guard=guard)
    _, kept = newton.kept_where_not_finite(newton.symmetrised(found), matrices)
    newton.kept_where_not_finite(newton.exact_inverse(matrices), matrices)
    assert damping.shape == (2,) and kept.shape == (2,)
    with pytest.raises(RuntimeError, match="meta"):
        int(kept.sum())


def test_a_batch_is_inverted_exactly_by_several_threads() -> None:
    """torch's own LU of a batch of such matrices fails with two threads (pytorch/pytorch#141358)."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        root = torch.randn(4, 257, 257, dtype=torch.float64)
        matrices = root @ root.mT / 257 + torch.eye(257, dtype=torch.float64)
        product = newton.exact_inverse(matrices) @ matrices
    finally:
        torch.set_num_threads(threads)
    torch.testing.assert_close(product, torch.eye(257, dtype=torch.float64).expand_as(product))
