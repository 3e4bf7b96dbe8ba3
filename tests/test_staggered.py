"""`refresh="staggered"`: which inverses change at which step, from which statistics, what does not change.

Inverses are computed by the test from the factors in the state before the step, by `torch.linalg.inv`. In the
first period after all layers were refreshed together some inverses are renewed from the same statistics, and
so do not change; the tests look at later periods.
"""

import copy
import io
from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kfac_fx
from tests.training import differing, snapshot, twin

pytestmark = pytest.mark.usefixtures("equal_models_share_a_capture")

Layers = dict[str, dict[str, Tensor]]
WITH_INVERSES = [name for name in kfac_fx.methods() if name not in ("diagonal", "singd", "ikfac")]
KFAC = kfac_fx.KFAC(statistics_every=1, inverse_every=4, damping=0.1)
NKFAC = kfac_fx.NKFAC(statistics_every=8, inverse_every=4, exact_every=1, damping=0.0, damping_floor=0.05)


class Attention(nn.Module):
    """Queries, keys and values of one input; a head of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x)).mean(1))


def layered() -> nn.Module:
    """Layers whose refreshes differ in cost: 0 the most, then 2, then 4."""
    net = nn.Sequential(nn.Linear(24, 8), nn.Tanh(), nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 3))
    return net.double()


def batches(count: int, *sizes: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    shape = sizes or (24,)
    return [
        (
            torch.randn(9, *shape, generator=generator, dtype=torch.float64),
            torch.randint(3, (9,), generator=generator),
        )
        for _ in range(count)
    ]


def compiled(model: nn.Module, method: Any = KFAC, **options: Any) -> kfac_fx.TrainStep:
    options = {"refresh": "staggered", "backend": "eager"} | options
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.05, momentum=0.9)
    return kfac_fx.compile(model, F.cross_entropy, method=method, optimizer=optimizer, **options)


def copied(step: kfac_fx.TrainStep) -> Layers:
    """Tensors of each layer, by name."""
    layers = step.state_dict()["curvature"]
    return {key: {name: tensor.clone() for name, tensor in layer.items()} for key, layer in layers.items()}


def history(step: kfac_fx.TrainStep, data: Iterable[tuple[Tensor, Tensor]]) -> list[Layers]:
    """The layers' tensors after each step."""
    return [copied(step) for batch in data if step(*batch) is not None]


def renewed(before: Layers, after: Layers, name: str = "G_inverse") -> set[str]:
    """Layers of which this tensor has changed."""
    return {key for key in after if not torch.equal(before[key][name], after[key][name])}


def factored_inverses(layer: dict[str, Tensor], damping: float) -> dict[str, Tensor]:
    """(A + pi sqrt(damping) I)^-1 and (G + sqrt(damping)/pi I)^-1, pi^2 the ratio of the mean eigenvalues."""
    a, g = layer["A"][0], layer["G"][0]
    pi = (a.trace() / len(a) / (g.trace() / len(g))).sqrt()
    eyes = torch.eye(len(a), dtype=a.dtype), torch.eye(len(g), dtype=g.dtype)
    root = damping**0.5
    return {
        "A_inverse": torch.linalg.inv(a + pi * root * eyes[0]),
        "G_inverse": torch.linalg.inv(g + root / pi * eyes[1]),
    }


def floored_inverses(layer: dict[str, Tensor], damping: float) -> dict[str, Tensor]:
    """(A + damping I)^-1 and (G + damping I)^-1."""
    return {
        f"{side}_inverse": torch.linalg.inv(
            layer[side][0] + damping * torch.eye(layer[side].shape[-1], dtype=torch.float64)
        )
        for side in ("A", "G")
    }


def test_each_layer_is_refreshed_once_per_period_the_costliest_first() -> None:
    states = history(compiled(layered()), batches(17))[4:]
    changes = [renewed(before, after) for before, after in pairwise(states)]
    first, second, third = {"0.weight"}, {"2.weight"}, {"4.weight"}
    assert changes == [second, third, set(), first] * 3
    assert [renewed(*pair, name="A_inverse") for pair in pairwise(states)] == changes
    everything = first | second | third
    for options in ({"refresh": "together"}, {}):
        together = history(kfac_fx.compile(layered(), method=KFAC, **options), batches(6))
        assert [renewed(*pair) for pair in pairwise(together)] == [set(), set(), set(), everything, set()]


def test_steps_with_statistics_refresh_nothing_where_other_steps_can() -> None:
    method = kfac_fx.KFAC(statistics_every=3, inverse_every=6)
    states = history(compiled(layered(), method), batches(19))[6:]
    changes = [renewed(before, after) for before, after in pairwise(states)]
    order = [{"0.weight"}, {"2.weight"}, set(), {"4.weight"}, set(), set()]
    assert changes == order * 2
    statistics = [bool(renewed(*pair, name="G")) for pair in pairwise(states)]
    assert statistics == [False, False, True, False, False, True] * 2


def test_statistics_come_in_parts_each_layer_once_and_never_at_once_with_a_refresh() -> None:
    method = kfac_fx.KFAC(statistics_every=6, inverse_every=12)
    states = history(compiled(layered(), method), batches(37))[12:]
    parts = [renewed(*pair, name="G") for pair in pairwise(states)]
    assert parts[5::6] == [{"0.weight"}] * 4  # the first pair is of steps 12 and 13
    assert parts[1::6] == [{"2.weight"}] * 4 and parts[3::6] == [{"4.weight"}] * 4
    assert not any(parts[::2])
    refreshed = [renewed(*pair) for pair in pairwise(states)]
    assert sorted(key for keys in refreshed for key in keys) == sorted(
        ["0.weight", "2.weight", "4.weight"] * 2
    )
    assert not any(part and keys for part, keys in zip(parts, refreshed, strict=True))


def test_parts_of_statistics_are_those_of_the_whole_graph() -> None:
    """The factors of a part of the layers, against a step that collects all from the same batch."""
    method = kfac_fx.KFAC(statistics_every=6, inverse_every=12)
    model, data = layered(), batches(14)
    step = compiled(model, method)
    states = history(step, data[:12])
    other = compiled(copy.deepcopy(model), method, refresh="together")
    other.load_state_dict(copy.deepcopy(step.state_dict()))
    after, whole = copied_after(step, data[12]), copied_after(other, data[12])
    changed = renewed(states[-1], after, name="G")
    assert changed and changed != set(after)
    for key in changed:
        for name in ("A", "G"):
            assert torch.equal(after[key][name], whole[key][name])


def copied_after(step: kfac_fx.TrainStep, batch: tuple[Tensor, Tensor]) -> Layers:
    step(*batch)
    return copied(step)


@pytest.mark.parametrize(
    ("method", "inverses", "damping"), [(KFAC, factored_inverses, 0.1), (NKFAC, floored_inverses, 0.05)]
)
def test_new_inverses_are_those_of_the_factors_before_the_step(
    method: Any, inverses: Any, damping: float
) -> None:
    states = history(compiled(layered(), method), batches(9 if method is KFAC else 21))
    seen, moved = set(), False
    for before, after in pairwise(states):
        for key in renewed(before, after):
            seen.add(key)
            expected, later = inverses(before[key], damping), inverses(after[key], damping)
            for name, inverse in expected.items():
                torch.testing.assert_close(after[key][name][0], inverse, rtol=1e-9, atol=1e-12)
                moved |= not torch.allclose(later[name], inverse, rtol=1e-6)
    assert seen == set(states[0])
    assert moved == (method is KFAC)  # statistics of the same step would be noticed; NKFAC's are elsewhere
    initial = {
        key: inverses(layer, damping) for key, layer in states[0].items()
    }  # the first: all, afterwards
    for key, layer in states[0].items():
        torch.testing.assert_close(layer["G_inverse"][0], initial[key]["G_inverse"], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("method", [KFAC, NKFAC, kfac_fx.EKFAC(statistics_every=1, inverse_every=4)])
def test_readers_of_one_input_are_refreshed_together(method: Any) -> None:
    step = compiled(Attention().double(), method)
    states = history(step, batches(13 if method is not NKFAC else 25, 4, 6))[4:]
    wanted = [2, 2, 4] if method is not NKFAC else [2, 3, 15]  # its statistics change every eighth step
    names = ("G_basis",) if method.name == "ekfac" else ("G_inverse",)
    changes = [renewed(*pair, name=name) for pair in pairwise(states) for name in names]
    together = {"q.weight", "k.weight", "v.weight"}
    assert [changes.count(keys) for keys in (together, {"head.weight"}, set())] == wanted
    live = step.state_dict()["curvature"]
    assert live["q.weight"]["A"] is live["k.weight"]["A"] is live["v.weight"]["A"]
    for before, after in pairwise(states):
        if method is NKFAC and renewed(before, after) == together:
            expected = floored_inverses(before["q.weight"], 0.05)["A_inverse"]
            for key in together:
                torch.testing.assert_close(after[key]["A_inverse"][0], expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", WITH_INVERSES)
def test_a_run_resumed_within_a_period_is_the_same_bit_for_bit(name: str) -> None:
    method = type(kfac_fx.compile(layered(), method=name).method)(statistics_every=2, inverse_every=5)
    model = layered()
    step = compiled(model, method)
    data = batches(14)
    history(step, data[:7])
    other = twin(model)
    resumed = compiled(other, method)
    saved = io.BytesIO()
    torch.save(step.state_dict(), saved)
    saved.seek(0)
    resumed.load_state_dict(torch.load(saved, weights_only=True))
    for batch in data[7:]:
        assert torch.equal(step(*batch), resumed(*batch))
    assert not differing(snapshot(model, step), snapshot(other, resumed))
    refreshes = step.state_dict()["counts"]["refreshes"]
    periods = {key: count - 1 for key, count in refreshes.items()}  # without the first, of all layers
    assert set(periods.values()) <= {2, 3}, "13 later steps are two periods and a part"
    assert len(set(periods.values())) == 2


def test_with_a_period_of_one_step_all_layers_are_refreshed_from_earlier_statistics() -> None:
    method = kfac_fx.KFAC(statistics_every=1, inverse_every=1, damping=0.1)
    states = history(compiled(layered(), method), batches(4))
    for before, after in pairwise(states[1:]):
        assert renewed(before, after) == set(after)
        for key, layer in before.items():
            expected = factored_inverses(layer, 0.1)["G_inverse"]
            torch.testing.assert_close(after[key]["G_inverse"][0], expected, rtol=1e-9, atol=1e-12)


def test_a_layer_that_appears_late_is_refreshed_at_once_and_then_in_its_slot() -> None:
    model = layered()
    model[2].requires_grad_(False)
    step = compiled(model)
    step.optimizer.param_groups[0]["params"] = list(model.parameters())
    data = batches(16)
    early = history(step, data[:6])
    assert set(early[-1]) == {"0.weight", "4.weight"}
    model[2].requires_grad_(True)
    late = history(step, data[6:7])
    expected = factored_inverses(late[0]["2.weight"], 0.1)["G_inverse"]
    torch.testing.assert_close(late[0]["2.weight"]["G_inverse"][0], expected, rtol=1e-9, atol=1e-12)
    later = [*late, *history(step, data[7:15])]
    changes = [key for pair in pairwise(later) for key in renewed(*pair)]
    assert sorted(changes) == sorted(["0.weight", "2.weight", "4.weight"] * 2)


def test_accumulated_halves_equal_the_step_of_the_whole_batch() -> None:
    for method in (KFAC, kfac_fx.EKFAC(statistics_every=1, inverse_every=3)):
        models = layered(), layered()
        models[1].load_state_dict(models[0].state_dict())
        whole, halves = compiled(models[0], method), compiled(models[1], method)
        for inputs, targets in batches(7):
            whole(inputs, targets)
            halves.accumulate(inputs[:4], targets[:4])
            halves.accumulate(inputs[4:], targets[4:])
            halves.update()
            for left, right in zip(models[0].parameters(), models[1].parameters(), strict=True):
                torch.testing.assert_close(left, right, rtol=1e-9, atol=1e-11)


def test_discarded_batches_leave_no_refresh_behind() -> None:
    model = layered()
    step = compiled(model)
    data = batches(8)
    history(step, data[:5])  # the step that comes refreshes layer 2
    before = snapshot(model, step)
    step.accumulate(*data[5])
    step.accumulate(*data[6])
    step.discard()
    assert not differing(before, snapshot(model, step))
    step(*data[7])
    changed = differing(before, snapshot(model, step))
    assert "state.curvature.2.weight.G_inverse" in changed


@pytest.mark.parametrize("call", ["step", "accumulate"])
def test_a_step_that_fails_takes_its_refresh_back(call: str) -> None:
    model = layered()
    step = compiled(model)
    data = batches(6)
    history(step, data[:5])
    before = snapshot(model, step)
    inputs, targets = data[5]
    with pytest.raises(kfac_fx.errors.NonFiniteLossError):
        (step if call == "step" else step.accumulate)(inputs * torch.inf, targets)
    assert not differing(before, snapshot(model, step))


@pytest.mark.parametrize(
    ("method", "named"),
    [(kfac_fx.KFAC(quadratic_model=True), "quadratic_model=True"), ("diagonal", "inverse_every=0")],
)
def test_methods_that_cannot_refresh_in_parts_refuse_with_the_remedy(method: Any, named: str) -> None:
    with pytest.raises(ValueError, match="refresh='staggered'") as raised:
        compiled(layered(), method)
    assert named in str(raised.value)
    assert "refresh='together'" in str(raised.value)
    kfac_fx.compile(layered(), F.cross_entropy, method=method, refresh="together")


def test_another_word_is_refused_with_the_choices() -> None:
    with pytest.raises(ValueError, match=r"refresh='stagger' does not exist.*staggered, together"):
        compiled(layered(), refresh="stagger")
