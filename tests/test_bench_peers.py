"""`kfac-fx bench --peers`: other libraries run as many statistics and refreshes as their schedule says."""

import importlib

import pytest
import torch
from torch import Tensor, nn

from kfac_fx.bench import bench
from kfac_fx.bench.peers import singd
from kfac_fx.bench.run import _reason
from kfac_fx.methods import resolve

Data = tuple[nn.Module, nn.Module, Tensor, Tensor]


def perceptron() -> Data:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.LayerNorm(8), nn.Linear(8, 3))
    return model, nn.CrossEntropyLoss(), torch.randn(4, 1, 4, 4), torch.randint(3, (4,))


def test_singd_updates_its_roots_when_statistics_are_due(monkeypatch: pytest.MonkeyPatch) -> None:
    model, *data = perceptron()
    library, made = importlib.import_module("singd.optim.optimizer"), []

    def kept(*arguments: object, **settings: object) -> object:
        made.append(original(*arguments, **settings))
        return made[0]

    original = library.SINGD
    monkeypatch.setattr(library, "SINGD", kept)
    peer = singd(model, (*data,), resolve("singd"))
    assert peer.kinds == {"plain": tuple(range(1, 10)), "statistics": (0,)} and peer.every == (10, 0)

    def root() -> Tensor:
        return made[0].Ks["3"].to_dense().clone()

    for index in (0, 1, 9, 0, 5, 0):
        before, weight = root(), model[3].weight.detach().clone()
        peer.run(index)
        assert torch.equal(root(), before) is (index != 0)
        assert not torch.equal(model[3].weight, weight)


def test_peers_are_timed_and_those_that_are_missing_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def find(name: str) -> object:
        if name.startswith("asdl"):
            raise ImportError(name)
        return original(name)

    original = importlib.import_module
    monkeypatch.setattr(importlib, "import_module", find)
    report = bench(*perceptron(), methods=["singd"], statistics_every=2, steps=1, warmup=1, peers=True)
    assert [entry.label for entry in report.contenders] == ["sgd", "adamw", "singd", "peer: singd"]
    peer = report.contenders[-1]
    assert {kind.name: kind.per_period for kind in peer.kinds} == {"plain": 1, "statistics": 1}
    assert peer.memory is None and peer.phases == ()
    assert report.left_out == {"peer: asdfghjkl": "not installed"}


def test_a_peer_that_fails_is_named_with_the_reason() -> None:
    data = nn.Sequential(nn.LayerNorm(3)), nn.MSELoss(), torch.randn(4, 3), torch.randn(4, 3)
    report = bench(*data, methods=["kfac"], steps=1, warmup=1, peers=True)
    assert [entry.label for entry in report.contenders] == ["sgd", "adamw", "kfac"]
    assert report.left_out["peer: singd"].startswith("ValueError: ")


def test_a_peer_that_needs_a_build_for_cuda_is_named_so() -> None:
    error = RuntimeError("NVTX functions not installed. Are you sure you have a CUDA build?")  # torch's words
    assert _reason(error).startswith("not available on this build of torch")
    assert _reason(ValueError("other")) == "ValueError: other"
