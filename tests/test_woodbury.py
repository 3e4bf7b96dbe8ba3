"""Thin factors against dense algebra: oracles W1 to W12 of methods.md section 15 that need no model.

Every reference is a dense formula written here; U is [d, m], the library's rows are X = U^T.
"""

import itertools

import pytest
import torch
from torch import Tensor

from kfac_fx import rows, woodbury
from kfac_fx.gram import InputRows
from tests.oracles import relative_error

TOLERANCE = 1e-10


def draw(*sizes: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*sizes, dtype=torch.float64).to(dtype)


def dense(x: Tensor, gamma: float) -> Tensor:
    """(U U^T + gamma I)^-1 of rows [m, d], in float64."""
    wide = x.double()
    return torch.linalg.inv(wide.T @ wide + gamma * torch.eye(x.shape[1], dtype=torch.float64))


def gammas(*values: float, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor(values, dtype=dtype)


def z_of(x: Tensor, *values: float) -> Tensor:
    z, usable = woodbury.whitened(x, gammas(*values))
    assert usable.all()
    return z


def test_w1_the_thin_inverse_equals_the_dense_one() -> None:
    x = draw(2, 8, 40)
    inverse = woodbury.materialised(z_of(x, 0.3, 0.7), gammas(0.3, 0.7))
    for group, gamma in enumerate((0.3, 0.7)):
        assert relative_error(inverse[group], dense(x[group], gamma)) < TOLERANCE


@pytest.mark.parametrize("share", [1.0, 1e-2, 1e-3])
def test_w1_single_precision_keeps_four_digits(share: float) -> None:
    x = draw(1, 8, 40, dtype=torch.float32)
    gamma = share * float(torch.linalg.matrix_norm(x.double(), 2)) ** 2
    inverse = woodbury.materialised(z_of(x, gamma).float(), gammas(gamma, dtype=torch.float32))
    assert relative_error(inverse[0].double(), dense(x[0], gamma)) < 1e-4


def test_w2_both_implicit_products_equal_the_dense_ones() -> None:
    x, gamma = draw(2, 8, 40), gammas(0.3, 0.05)
    z = z_of(x, 0.3, 0.05)
    right, left = draw(2, 5, 40), draw(2, 40, 5)
    for group in range(2):
        inverse = dense(x[group], float(gamma[group]))
        found = woodbury.apply_right(right, z, gamma)[group]
        assert relative_error(found, right[group] @ inverse) < TOLERANCE
        assert relative_error(woodbury.apply_left(left, z, gamma)[group], inverse @ left[group]) < TOLERANCE


def test_w3_rows_that_are_not_normalised_need_the_number_of_rows_beside_gamma() -> None:
    raw, gamma = draw(8, 40), 0.3
    small = raw @ raw.T + 8 * gamma * torch.eye(8, dtype=torch.float64)
    expected = (torch.eye(40, dtype=torch.float64) - raw.T @ torch.linalg.inv(small) @ raw) / gamma
    found = woodbury.materialised(z_of(raw[None] / 8**0.5, gamma), gammas(gamma))[0]
    assert relative_error(found, expected) < TOLERANCE


def test_w4_z_transposed_z_is_the_middle_term_of_the_identity() -> None:
    x, gamma = draw(8, 40), 0.3
    small = x @ x.T + gamma * torch.eye(8, dtype=torch.float64)
    z = z_of(x[None], gamma)[0]
    assert relative_error(z.T @ z, x.T @ torch.linalg.inv(small) @ x) < TOLERANCE


DIM = 40


def window_of(batches: list[Tensor], *, window: int, decay: float) -> tuple[Tensor, Tensor]:
    kept, weights = torch.zeros(1, window * 3, DIM, dtype=torch.float64), torch.zeros(window).double()
    for batch in batches:
        kept, weights = woodbury.pushed(kept, weights, batch, decay=decay)
    return kept, weights


@pytest.mark.parametrize("count", [1, 2, 4])
def test_w5_a_window_that_holds_all_batches_is_the_bias_corrected_average(count: int) -> None:
    batches, decay = [draw(1, 3, DIM) for _ in range(count)], 0.6
    average, total = torch.zeros(DIM, DIM, dtype=torch.float64), 0.0
    for batch in batches:  # the dense moving average from zero
        average = decay * average + (1 - decay) * batch[0].T @ batch[0]
        total = decay * total + (1 - decay)
    kept = woodbury.averaged_rows(*window_of(batches, window=4, decay=decay))[0]
    assert relative_error(kept.T @ kept, average / total) < TOLERANCE


def test_w5_a_window_of_w_batches_drops_at_most_the_wth_power_of_the_decay() -> None:
    batches, decay = [draw(1, 3, DIM) for _ in range(40)], 0.7
    moments = [b[0].T @ b[0] for b in batches]
    weights = [decay ** (39 - i) for i in range(40)]
    full = sum(w * m for w, m in zip(weights, moments, strict=True)) / sum(weights)
    largest = max(float(m.norm()) for m in moments)
    errors = []
    for window in (1, 3, 9):
        kept = woodbury.averaged_rows(*window_of(batches, window=window, decay=decay))[0]
        errors.append(float((kept.T @ kept - full).norm()))
        assert errors[-1] <= 2 * decay**window * largest
    assert errors == sorted(errors, reverse=True)


def test_a_longer_block_keeps_the_older_ones_aligned_and_a_shorter_one_is_padded() -> None:
    batches = [draw(1, size, DIM) for size in (3, 5, 2)]
    kept, weights = window_of(batches, window=3, decay=0.5)
    assert kept.shape == (1, 15, DIM) and weights.tolist() == [1.0, 0.5, 0.25]
    for block, batch in zip(kept[0].split(5), reversed(batches), strict=True):
        size = batch.shape[1]
        assert torch.equal(block[:size], batch[0]) and not block[size:].any()


def test_a_block_that_is_not_finite_changes_nothing_but_the_length() -> None:
    kept, weights = window_of([draw(1, 3, DIM)], window=2, decay=0.5)
    bad = draw(1, 4, DIM).index_fill(1, torch.tensor([2]), float("inf"))
    after, same = woodbury.pushed(kept, weights, bad, decay=0.5)
    assert torch.equal(same, weights) and after.shape[1] == 8
    assert torch.equal(after.unflatten(1, (2, 4))[:, :, :3], kept.unflatten(1, (2, 3)))


@pytest.mark.parametrize(("sizes", "dropped"), [((3, 3, 14, 5), 0), ((3, DIM, 2), 0), ((3, 3, 3, 13, 14), 1)])
def test_a_window_of_d_rows_becomes_the_average_of_all_its_batches(
    sizes: tuple[int, ...], dropped: int
) -> None:
    """From the first batch with which 3 blocks would have d rows; nothing is dropped any more."""
    batches, decay = [draw(1, size, DIM) for size in sizes], 0.7
    kept, weights = window_of(batches, window=3, decay=decay)
    assert kept.shape == (1, DIM, DIM)
    shares = [decay**age for age in reversed(range(len(sizes) - dropped))]
    parts = [w * b[0].T @ b[0] for w, b in zip(shares, batches[dropped:], strict=True)]
    found = woodbury.averaged_rows(kept, weights)[0]
    assert relative_error(found.T @ found, sum(parts) / sum(shares)) < TOLERANCE
    bad = draw(1, 4, DIM).index_fill(1, torch.tensor([2]), float("nan"))
    after, same = woodbury.pushed(kept, weights, bad, decay=decay)
    assert torch.equal(after, kept) and torch.equal(same, weights)


def drawn_rows(uses: list[InputRows], positions: Tensor) -> Tensor:
    """Of A with a bias, from the same positions of every use."""
    totals = [use.rows.shape[2] for use in uses]
    count = rows.total_count(
        [(use.rows.shape[1] * total, use.kept) for use, total in zip(uses, totals, strict=True)]
    )
    return rows.weighted_rows([rows.at_positions(use, positions) for use in uses], totals, count, bias=True)


def test_w6_all_positions_give_the_dense_expand_factor() -> None:
    a = draw(2, 4, 5, 3)
    x = drawn_rows([InputRows(rows=a, ones=True)], torch.arange(5))
    whole = torch.cat([a, torch.ones_like(a[..., :1])], -1).flatten(1, 2)
    assert relative_error(x.mT @ x, torch.einsum("gni,gnj->gij", whole, whole) / 20) < TOLERANCE


def test_w8_the_mean_over_all_choices_of_positions_is_the_expand_factor() -> None:
    """T = 5, s = 2: every subset once, with the bias column for A and 1/R for G."""
    a, g, terms = draw(1, 4, 5, 3), draw(1, 4, 5, 2), torch.tensor(4.0, dtype=torch.float64)
    choices = [torch.tensor(c) for c in itertools.combinations(range(5), 2)]
    uses = [InputRows(rows=a, ones=True)]
    found_a, found_g = 0.0, 0.0
    for choice in choices:
        x = drawn_rows(uses, choice)[0]
        y = rows.output_rows([g], terms, reduced=False, positions=[choice])[0]
        assert x.shape == (8, 4) and y.shape == (8, 2)
        found_a, found_g = found_a + x.T @ x / len(choices), found_g + y.T @ y / len(choices)
    whole = torch.cat([a, torch.ones_like(a[..., :1])], -1)[0].flatten(0, 1)
    assert relative_error(found_a, whole.T @ whole / 20) < TOLERANCE
    assert relative_error(found_g, 4 * g[0].flatten(0, 1).T @ g[0].flatten(0, 1)) < TOLERANCE


def test_drawn_positions_repeat_differ_between_draws_and_are_uniform() -> None:
    def positions(draws: int, seed: int = 3) -> list[int]:
        return rows.drawn_positions(torch.tensor(draws), seed=seed, num=12, count=4).tolist()

    chosen = [positions(draws) for draws in range(3000)]
    assert chosen[:50] == [positions(draws) for draws in range(50)]
    assert chosen[:50] != [positions(draws, seed=4) for draws in range(50)]
    assert all(len(set(c)) == 4 and 0 <= min(c) and max(c) < 12 for c in chosen)
    singles = torch.bincount(torch.tensor(chosen).flatten(), minlength=12) / 3000
    assert (singles - 4 / 12).abs().max() < 5 * (1 / 3 * 2 / 3 / 3000) ** 0.5
    together = torch.zeros(12, 12)
    for choice in chosen:
        for pair in itertools.permutations(choice, 2):
            together[pair] += 1 / 3000
    pairs = together[~torch.eye(12, dtype=torch.bool)]
    assert (pairs - 4 * 3 / (12 * 11)).abs().max() < 5 * (0.091 * 0.909 / 3000) ** 0.5
    assert rows.drawn_positions(torch.tensor(1), seed=0, num=3, count=4).tolist() == [0, 1, 2]


def test_w9_without_rows_the_inverse_is_the_identity_over_gamma() -> None:
    z, vector = z_of(torch.zeros(1, 4, 6, dtype=torch.float64), 0.2), draw(1, 3, 6)
    assert relative_error(woodbury.apply_right(vector, z, gammas(0.2)), vector / 0.2) < 1e-15
    inverse = woodbury.materialised(z, gammas(0.2))[0]
    assert relative_error(inverse, torch.eye(6, dtype=torch.float64) / 0.2) < 1e-15


def test_w10_vectors_orthogonal_to_the_rows_are_divided_by_gamma() -> None:
    x, gamma = draw(1, 8, 40), gammas(0.3)
    basis = torch.linalg.qr(x[0].T).Q
    vector = draw(5, 40)
    vector = vector - vector @ basis @ basis.T
    found = woodbury.apply_right(vector[None], z_of(x, 0.3), gamma)[0]
    assert relative_error(found, vector / 0.3) < 1e-12


def test_w11_the_formula_with_two_known_defects_is_another_matrix() -> None:
    """The inverse of C taken for that of its root, and n gamma beside a Gram already divided by n."""
    raw, gamma = draw(8, 40), 0.3
    x = raw / 8**0.5
    eye = torch.eye(40, dtype=torch.float64)
    small = x @ x.T + 8 * gamma * torch.eye(8, dtype=torch.float64)
    wrong = (eye - x.T @ torch.cholesky_inverse(small) @ x) / gamma
    found = woodbury.materialised(z_of(x[None], gamma), gammas(gamma))[0]
    assert relative_error(wrong, found) > 0.1


def test_w11_averages_of_rows_shrink_the_factor_and_the_window_does_not() -> None:
    decay, trace, plain = 0.9, 0.0, torch.zeros(30, 50, dtype=torch.float64)
    kept, weights = torch.zeros(1, 50, 50, dtype=torch.float64), torch.zeros(200, dtype=torch.float64)
    for _ in range(200):
        batch = draw(30, 50) / 30**0.5
        plain = decay * plain + (1 - decay) * batch
        trace += float((batch**2).sum()) / 200
        kept, weights = woodbury.pushed(kept, weights, batch[None], decay=decay)
    shrunk = float((plain**2).sum()) / trace
    assert shrunk == pytest.approx((1 - decay) / (1 + decay), rel=0.2)
    window = float((woodbury.averaged_rows(kept, weights) ** 2).sum()) / trace
    assert window == pytest.approx(1, rel=0.1)


@pytest.mark.parametrize("gamma", [1e-1, 1e-2, 1e-3, 1e-4, 1e-5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_w12_the_error_on_the_span_of_the_rows_is_bounded(gamma: float, dtype: torch.dtype) -> None:
    """Where the whole matrix looks exact and the gradient lies; ||U||_2 = 1, d = 200, m = 16."""
    x = draw(16, 200)
    x = (x / torch.linalg.matrix_norm(x, 2)).to(dtype)
    z = z_of(x[None], gamma).to(dtype)
    found = woodbury.apply_right(x[None], z, gammas(gamma, dtype=dtype))[0].double()
    bound = 30 * torch.finfo(torch.float32).eps / gamma if dtype is torch.float32 else 1e-9
    assert relative_error(found, x.double() @ dense(x, gamma)) < bound


def test_more_rows_than_columns_are_compressed_without_loss() -> None:
    x = draw(2, 9, 4)
    small = woodbury.compressed(x)
    assert small.shape == (2, 4, 4)
    assert relative_error(small.mT @ small, x.mT @ x) < TOLERANCE
    assert torch.equal(woodbury.compressed(x[:, :4]), x[:, :4])


def test_rows_of_two_batches_join_by_the_roots_of_their_weights() -> None:
    first, second = draw(1, 2, 6), draw(1, 3, 6)
    weights = gammas(0.25)[0], gammas(0.75)[0]
    both = woodbury.joined_rows(first, second, weights)[0]
    expected = 0.25 * first[0].T @ first[0] + 0.75 * second[0].T @ second[0]
    assert both.shape == (5, 6) and relative_error(both.T @ both, expected) < TOLERANCE


def test_equal_sizes_are_solved_in_one_call_and_a_hopeless_matrix_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[tuple[int, ...]] = []
    whitened = woodbury.whitened
    monkeypatch.setattr(
        woodbury, "whitened", lambda x, gamma: calls.append(tuple(x.shape)) or whitened(x, gamma)
    )
    batches = [draw(2, 3, 9), draw(1, 4, 9), draw(1, 3, 9) * float("nan"), draw(1, 3, 9)]
    results = woodbury.thin_inverses(batches, [gammas(*[0.1] * len(b)) for b in batches])
    assert sorted(calls) == [(1, 4, 9), (4, 3, 9)]
    assert [usable.tolist() for _, usable in results] == [[True, True], [True], [False], [True]]
    for batch, (z, usable) in zip(batches, results, strict=True):
        for group in range(len(batch)):
            if usable[group]:
                assert relative_error(z[group], whitened(batch[group : group + 1], gammas(0.1))[0][0]) < 1e-14
