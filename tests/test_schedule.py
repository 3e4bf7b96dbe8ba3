"""Which layers form a unit, and how units are dealt into the slots of a period."""

from itertools import pairwise

import torch
from torch import nn
from torch.nn import functional as F

import kfac_fx
from kfac_fx.schedule import Schedule, dealt, refresh_slots, units


def test_no_slot_of_a_resnet_has_much_more_than_its_share() -> None:
    wide = (16, 16, 16, 16, 32, 32, 32, 32, 64, 64, 64, 64, 64)
    model = nn.Sequential(*(nn.Conv2d(i, o, 3, padding=1) for i, o in pairwise(wide)))
    inputs, targets = torch.randn(2, 16, 4, 4), torch.randn(2, 64, 4, 4)
    for statistics_every, period in ((1, 3), (2, 4), (4, 40)):
        method = kfac_fx.NKFAC(statistics_every=statistics_every, inverse_every=period)
        plan = kfac_fx.inspect(model, F.mse_loss, inputs, targets, method=method)
        costs = {match.key: 0 for match in plan.matched}
        for spec in plan.factors:
            costs[spec.owner] += spec.flops_refresh
        schedule = Schedule(method)
        schedule.learn({key: (key,) for key in costs}, plan.factors)
        slots = [schedule.slot(step) for step in range(period)]
        assert sorted(key for slot in slots for key in slot) == sorted(costs)
        loads = [sum(costs[key] for key in slot) for slot in slots]
        assert max(loads) <= max(*costs.values(), 1.5 * sum(costs.values()) / period)


def test_units_are_connected_through_the_tensors_they_share() -> None:
    read = {"a": ("x", "u"), "b": ("y",), "c": ("u", "z"), "d": ("z", "y"), "e": ("w",)}
    assert sorted(map(sorted, units(read))) == [["a", "b", "c", "d"], ["e"]]
    assert len(units({key: (key,) for key in read})) == 5


def test_slots_follow_from_costs_and_names_in_whatever_order_they_come() -> None:
    costs = {("a", "b"): 7, ("c",): 4, ("d",): 4, ("e",): 1, ("f",): 0}
    found = dealt(costs, range(3))
    assert found == {0: ("a", "b"), 1: ("c", "e"), 2: ("d", "f")}
    assert dealt(dict(reversed(costs.items())), range(3)) == found
    assert refresh_slots(5, period=10**9, statistics_every=10) == [1, 2, 3, 4, 5]
