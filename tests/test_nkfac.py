"""One NKFAC step of every layer kind against dense formulas; what is shared, batched and counted.

Step by step over 30 steps: `test_nkfac_transcription`; the method's own functions: `test_nkfac_method`.
"""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kfac_fx
from kfac_fx.methods import nkfac

from . import oracles
from .plain_nkfac import power

TOLERANCE = 1e-10


def compiled(model: nn.Module, loss_fn: Any = F.cross_entropy, **settings: Any) -> kfac_fx.TrainStep:
    """A step with plain SGD at rate 1 on a copy."""
    twin = copy.deepcopy(model)
    options = {name: settings.pop(name) for name in ("fisher", "sharing", "backend") if name in settings}
    return kfac_fx.compile(
        twin,
        loss_fn,
        method=kfac_fx.NKFAC(**{"statistics_every": 1, "inverse_every": 1, **settings}),
        optimizer=torch.optim.SGD(twin.parameters(), lr=1.0),
        **{"backend": "eager", **options},
    )


def changes(model: nn.Module, step: kfac_fx.TrainStep) -> dict[str, Tensor]:
    """What was subtracted from each parameter."""
    before = dict(model.named_parameters())
    return {name: (before[name] - p).detach() for name, p in step.model.named_parameters()}


def dense_inverse(moment: Tensor) -> Tensor:
    """The inverse that one batch's moment gives: first average, relative damping, exact inverse."""
    average = 0.05 * moment / (moment.norm() + 1e-12)
    diagonal = torch.equal(average, average.diag().diag())
    damping = max(1e-4, 0.01 * (float(average.max()) if diagonal else power(average)))
    return torch.linalg.inv(average + damping * torch.eye(len(moment), dtype=moment.dtype))


def dense_direction(A: list[Tensor], G: list[Tensor], gradient: list[Tensor]) -> list[Tensor]:
    """Direction of one layer, group by group: dense inverses and one common length."""
    raw = [dense_inverse(g) @ v @ dense_inverse(a) for a, g, v in zip(A, G, gradient, strict=True)]
    length, wanted = torch.stack(raw).norm(), torch.stack(gradient).norm()
    return [v * wanted / (length + 1e-12) for v in raw]


def error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    named = dict(model.named_parameters())
    return dict(zip(named, torch.autograd.grad(loss, list(named.values()), retain_graph=True), strict=True))


def as_rows(module: nn.Module, weight: Tensor, bias: Tensor | None) -> list[Tensor]:
    """[W b] of each group."""
    if isinstance(module, nn.Embedding):
        return [weight.T]
    groups = getattr(module, "groups", 1)
    whole = weight.flatten(1) if bias is None else torch.cat([weight.flatten(1), bias[:, None]], 1)
    return list(whole.chunk(groups))


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "dense": (lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3, bias=False)), (4,)),
    "sequence": (lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Flatten(), nn.Linear(15, 3)), (3, 4)),
    "conv": (lambda: nn.Sequential(nn.Conv2d(4, 6, 3, padding=1), nn.Flatten(), nn.Linear(96, 3)), (4, 4, 4)),
    "grouped": (
        lambda: nn.Sequential(nn.Conv2d(4, 8, 3, groups=2), nn.Flatten(), nn.Linear(32, 3)),
        (4, 4, 4),
    ),
    "depthwise": (
        lambda: nn.Sequential(nn.Conv2d(4, 4, 3, groups=4), nn.Flatten(), nn.Linear(16, 3)),
        (4, 4, 4),
    ),
    "embedding": (lambda: nn.Sequential(nn.Embedding(6, 4), nn.Flatten(), nn.Linear(12, 3)), (3,)),
}


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("case", list(CASES))
def test_one_step_of_every_layer_equals_dense_formulas(case: str, sharing: str) -> None:
    make, shape = CASES[case]
    model = make().double()
    x = torch.randint(6, (7, *shape)) if case == "embedding" else torch.randn(7, *shape, dtype=torch.float64)
    y = torch.randint(3, (7,))
    step = compiled(model, sharing=sharing)
    step(x, y)
    found = changes(model, step)
    outputs, uses = oracles.record_uses(model, x)
    loss = F.cross_entropy(outputs, y)
    grads = gradients(model, loss)
    (seed,) = torch.autograd.grad(loss, outputs, retain_graph=True)
    cotangents = oracles.cotangent_rows(outputs, uses, seed)
    for name, (use, *_) in uses.items():
        mode = "expand" if isinstance(use.module, nn.Embedding) else sharing
        inputs = oracles.pooled(use.rows, mode, torch.mean)
        rows = oracles.pooled(cotangents[name], mode, torch.sum)
        A = torch.einsum("ngti,ngtj->gij", inputs, inputs) / (inputs.shape[0] * inputs.shape[2])
        G = torch.einsum("ngti,ngtj->gij", rows, rows)
        bias = name.replace("weight", "bias")
        gradient = as_rows(use.module, grads[name], grads.get(bias))
        expected = dense_direction(list(A), list(G), gradient)
        ours = as_rows(use.module, found[name], found.get(bias))
        assert error(torch.stack(ours), torch.stack(expected)) < TOLERANCE, name


class Experts(nn.Module):
    """Two experts as one batched product."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 4, 3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.bmm(x, self.weight).sum(0)


def test_one_step_of_batched_experts_equals_dense_formulas() -> None:
    model = Experts().double()
    x, y = torch.randn(2, 7, 4, dtype=torch.float64), torch.randint(3, (7,))
    step = compiled(model)
    step(x, y)
    outputs = torch.bmm(x, model.weight)
    g = torch.autograd.grad(F.cross_entropy(outputs.sum(0), y), outputs)[0]
    expected = dense_direction(list(x.mT @ x), list(g.mT @ g), list(g.mT @ x))
    found = changes(model, step)["weight"].mT
    assert error(found, torch.stack(expected)) < TOLERANCE


class Tied(nn.Module):
    """Embedding and head share one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(6, 4), nn.Linear(4, 6, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embed(tokens))).flatten(0, 1)


def test_one_step_of_a_tied_weight_joins_both_uses_before_it_normalises() -> None:
    model = Tied().double()
    tokens, y = torch.randint(6, (5, 3)), torch.randint(6, (15,))
    step = compiled(model)
    step(tokens, y)
    embedded = model.embed(tokens)
    hidden = torch.tanh(embedded)
    outputs = model.head(hidden).flatten(0, 1)
    loss = F.cross_entropy(outputs, y)
    seen = torch.autograd.grad(loss, [embedded, outputs, model.embed.weight])
    at_embedding, at_head, gradient = seen[0].flatten(0, 1), seen[1], seen[2]
    rows = hidden.detach().flatten(0, 1)
    counts = F.one_hot(tokens.flatten(), 6).double().mean(0)
    # Blocks of the transposed weight [4, 6]: (embedding) G (x) diag(counts), (head) A (x) diag(g g^T).
    g, a = at_embedding.T @ at_embedding, rows.T @ rows / 15
    head = at_head.square().sum(0)
    block = torch.kron(g, torch.diag(counts)) + torch.kron(a, torch.diag(head))
    block = block.reshape(4, 6, 4, 6)
    inner = torch.diag(torch.einsum("aiaj->ij", block))
    outer = torch.einsum("aibi->ab", block)
    average = 0.05 * inner / (inner.norm() + 1e-12)
    inverse = 1 / (average + max(1e-4, 0.01 * float(average.max())))
    raw = dense_inverse(outer) @ gradient.T * inverse
    expected = raw * gradient.norm() / raw.norm()
    assert error(changes(model, step)["embed.weight"].T, expected) < 1e-8  # the 1e-12 meets other scales


class SharedInput(nn.Module):
    """Query, key and value read one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(4, 5) for _ in range(3))
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.q(x) * torch.tanh(self.k(x)) + self.v(x))


def count_calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, int]]:
    """(which, batch, size) of every call that inverts."""
    calls: list[tuple[str, int, int]] = []
    for name in ("exact_inverse", "newton_inverse"):
        inner = getattr(nkfac, name)

        def counted(
            matrices: Tensor, *rest: Any, inner: Any = inner, name: str = name, **more: Any
        ) -> Tensor:
            calls.append((name, matrices.shape[0], matrices.shape[-1]))
            return inner(matrices, *rest, **more)

        monkeypatch.setattr(nkfac, name, counted)
    return calls


def test_a_shared_input_is_inverted_once_and_sizes_are_batched(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = count_calls(monkeypatch)
    model = SharedInput().double()
    step = compiled(model)
    for _ in range(4):
        step(torch.randn(7, 4, dtype=torch.float64), torch.randint(3, (7,)))
    # A of q, k, v once and their three G: four of size 5; head: A of size 6, G of size 3.
    assert sorted(calls[:3]) == [("exact_inverse", 1, 3), ("exact_inverse", 1, 6), ("exact_inverse", 4, 5)]
    assert sorted(calls[-3:]) == [(n.replace("exact", "newton"), b, d) for n, b, d in sorted(calls[:3])]
    curvature = step.state_dict()["curvature"]
    for name in ("A", "A_inverse"):
        assert curvature["q.weight"][name] is curvature["v.weight"][name]
    owned = {id(t): t.numel() * t.itemsize for state in curvature.values() for t in state.values()}
    assert sum(owned.values()) == sum(factor.bytes for factor in step.plan.factors)
    flops = {f.owner: f.flops_refresh for f in step.plan.factors if f.side == "A"}
    assert flops["k.weight"] == 0 and flops["q.weight"] == 4 * 5**3 + 40 * 5**2


def test_readers_of_a_shared_input_step_like_layers_of_their_own() -> None:
    model = SharedInput().double()
    x, y = torch.randn(7, 4, dtype=torch.float64), torch.randint(3, (7,))
    step = compiled(model)
    step(x, y)
    found, (outputs, uses) = changes(model, step), oracles.record_uses(model, x)
    loss = F.cross_entropy(outputs, y)
    (seed,) = torch.autograd.grad(loss, outputs, retain_graph=True)
    cotangents, grads = oracles.cotangent_rows(outputs, uses, seed), gradients(model, loss)
    for name in ("q", "k", "v"):
        a, g = uses[f"{name}.weight"][0].rows[:, 0, 0], cotangents[f"{name}.weight"][:, 0, 0]
        gradient = torch.cat([grads[f"{name}.weight"], grads[f"{name}.bias"][:, None]], 1)
        (expected,) = dense_direction([a.T @ a], [g.T @ g], [gradient])
        ours = torch.cat([found[f"{name}.weight"], found[f"{name}.bias"][:, None]], 1)
        assert error(ours, expected) < TOLERANCE


def diverging(inverse: float) -> dict[str, dict[str, Tensor]]:
    """Two layers with factors of a tenth of the identity; A of the first has an inverse that is far off."""
    states: dict[str, dict[str, Tensor]] = {}
    for layer, value in (("bad", inverse), ("good", 8.0)):
        eye = torch.eye(4)[None]
        states[layer] = {"A": 0.1 * eye, "A_inverse": value * eye, "G": 0.1 * eye, "G_inverse": 8.0 * eye}
        states[layer] |= {"A_kept": torch.zeros(1), "G_kept": torch.zeros(1)}
    return states


@pytest.mark.parametrize("inverse", [1e25, 1e38])  # the norm overflows, the product does
def test_a_newton_step_that_overflows_is_followed_by_an_exact_inverse_of_that_factor(
    monkeypatch: pytest.MonkeyPatch, inverse: float
) -> None:
    method, states, counts = kfac_fx.NKFAC(), diverging(inverse), {"bad": 7, "good": 7}
    calls = count_calls(monkeypatch)
    kept: list[int] = []
    for _ in range(3):
        new, refreshed = method.refresh(states, counts=counts)
        kept.append(int(refreshed.kept_last))
        states = {layer: {**state, **new[layer]} for layer, state in states.items()}
        if len(kept) == 1:
            assert torch.equal(states["bad"]["A_inverse"], inverse * torch.eye(4)[None])
            assert states["bad"]["A_kept"] == 1 and states["good"]["A_kept"] == 0
    assert kept == [1, 0, 0]
    assert calls[0] == ("newton_inverse", 4, 4) == calls[-1]
    assert sorted(calls[1:-1]) == [("exact_inverse", 1, 4), ("newton_inverse", 3, 4)]
    damped = 0.1 + 0.01 * 0.1
    assert torch.allclose(states["bad"]["A_inverse"][0], torch.eye(4) / damped)


def test_a_step_goes_on_after_its_newton_step_has_overflowed() -> None:
    model = nn.Linear(4, 3)
    step = compiled(model)
    x, y = torch.randn(7, 4), torch.randint(3, (7,))
    for _ in range(3):
        step(x, y)
    saved = step.state_dict()
    saved["curvature"]["weight"]["A_inverse"] = 1e38 * torch.eye(5)[None]
    step.load_state_dict(saved)
    step(x, y)
    assert step.counts["kept_last"] == 1
    step(x, y)
    state = step.state_dict()["curvature"]["weight"]
    assert step.counts["kept_last"] == 1 and not state["A_kept"].any()
    damped = state["A"][0] + 0.01 * torch.linalg.eigvalsh(state["A"][0])[-1] * torch.eye(5)
    assert error(state["A_inverse"][0] @ damped, torch.eye(5)) < 1e-2


def test_without_damping_a_word_that_never_occurred_is_left_alone() -> None:
    make, shape = CASES["embedding"]
    model = make().double()
    step = compiled(model, damping=0.0, damping_floor=0.0)
    step(torch.randint(5, (30, *shape)), torch.randint(3, (30,)))
    change = changes(model, step)["0.weight"]
    assert not change[5].any() and bool(change[:5].isfinite().all())
