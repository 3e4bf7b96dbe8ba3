"""The captured graph: autograd's loss and gradients at any parameters, the user's names and lines."""

import contextlib
import inspect
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import kfac_fx
from kfac_fx import Plan
from kfac_fx.capture import call_model
from kfac_fx.traced import Capture
from tests.training import twin


def evaluate(plan: Plan, model: nn.Module, *batch: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of the captured graph at the model's present values; its buffers are left alone."""
    buffers = [buffer.clone() for buffer in model.buffers()]
    outputs = plan.capture.graph(*[p.detach() for p in model.parameters()], *buffers, *batch)
    return outputs[0], dict(zip(plan.capture.gradients, outputs[1:], strict=True))


def autograd(model: nn.Module, loss_fn: Any, inputs: Any, targets: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """The same from PyTorch."""
    model = twin(model)
    loss = loss_fn(call_model(model, inputs), targets)
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return loss.detach(), {n: g for n, g in zip(named, found, strict=True) if g is not None}


def same(left: tuple[Tensor, dict[str, Tensor]], right: tuple[Tensor, dict[str, Tensor]]) -> None:
    assert torch.equal(left[0], right[0])
    assert set(left[1]) == set(right[1])
    assert [n for n in left[1] if not torch.equal(left[1][n], right[1][n])] == []


def moved(model: nn.Module) -> nn.Module:
    """A copy at other parameters."""
    model = twin(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    return model


# ---------------------------------------------------------------- checkpointing and randomness


class Block(nn.Module):
    def __init__(self, *, recompute: bool, count: int = 1) -> None:
        super().__init__()
        self.inner = nn.ModuleList(
            nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 4))
            for _ in range(count)
        )
        self.recompute = recompute

    def forward(self, x: Tensor) -> Tensor:
        for inner in self.inner:
            x = x + (checkpoint(inner, x, use_reentrant=False) if self.recompute else inner(x))
        return x


@pytest.mark.parametrize("count", [1, 3])
def test_a_checkpointed_region_recomputes_with_the_masks_of_its_first_run(count: int) -> None:
    model = Block(recompute=True, count=count).double()
    plain = Block(recompute=False, count=count).double()
    plain.load_state_dict(model.state_dict())
    x, y = torch.randn(6, 4).double(), torch.randn(6, 4).double()
    plan = kfac_fx.inspect(model, F.mse_loss, x, y)
    assert plan.coverage == 1.0
    for seed in range(3):
        torch.manual_seed(seed)
        ours = evaluate(plan, model, x, y)
        torch.manual_seed(seed)
        same(ours, autograd(plain, F.mse_loss, x, y))
    torch.manual_seed(7)
    assert not torch.equal(evaluate(plan, model, x, y)[0], ours[0])


def test_gradients_of_a_checkpointed_region_agree_with_finite_differences() -> None:
    """Without autograd as the judge: the loss is differenced with the random state held."""
    model = Block(recompute=True).double()
    x, y = torch.randn(6, 4).double(), torch.randn(6, 4).double()
    plan = kfac_fx.inspect(model, F.mse_loss, x, y)

    def loss() -> Tensor:
        torch.manual_seed(3)
        return evaluate(plan, model, x, y)[0]

    torch.manual_seed(3)
    gradients, step = evaluate(plan, model, x, y)[1], 1e-6
    for name, parameter in model.named_parameters():
        direction = torch.randn_like(parameter)
        with torch.no_grad():
            parameter.add_(step * direction)
            above = loss()
            parameter.sub_(2 * step * direction)
            below = loss()
            parameter.add_(step * direction)
        expected = (gradients[name] * direction).sum()
        assert (above - below) / (2 * step) == pytest.approx(float(expected), rel=1e-6, abs=1e-9), name


def test_two_equal_dropouts_keep_their_own_masks() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.layer(x)
            return F.dropout(hidden, 0.5) - F.dropout(hidden, 0.5)

    model, x, y = Twice(), torch.randn(5, 4), torch.randn(5, 4)
    plan = kfac_fx.inspect(model, F.mse_loss, x, y)
    torch.manual_seed(1)
    ours = evaluate(plan, model, x, y)
    torch.manual_seed(1)
    same(ours, autograd(model, F.mse_loss, x, y))
    assert ours[1]["layer.weight"].norm() > 0


def test_batch_norm_in_a_checkpointed_region_counts_as_pytorch_does() -> None:
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU())
            self.head = nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(checkpoint(self.block, x, use_reentrant=False))

    model, x, y = Normed(), torch.randn(5, 4), torch.randint(3, (5,))
    other = twin(model)
    step = kfac_fx.compile(
        model, F.cross_entropy, optimizer=torch.optim.SGD(model.parameters(), lr=0.0), backend="eager"
    )
    for _ in range(2):
        step(x, y)
        F.cross_entropy(other(x), y).backward()
    for (name, ours), plain in zip(model.named_buffers(), other.buffers(), strict=True):
        assert torch.equal(ours, plain), name


# ---------------------------------------------------------------- nothing is baked in


class Everything(nn.Module):
    """Buffers, constants, a non-trainable parameter, positional and keyword inputs, several outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.norm = nn.Embedding(9, 4), nn.LayerNorm(4)
        self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 3)
        self.body.requires_grad_(False)
        self.register_buffer("shift", torch.tensor([1.0, 2.0, 3.0, 4.0]))
        self.register_buffer("scale", torch.tensor(2.0), persistent=False)

    def forward(self, words: Tensor, *, weights: Tensor, flip: bool = False) -> dict[str, Tensor]:
        hidden = self.norm(self.table(words)) * weights.unsqueeze(-1) * self.scale + self.shift
        hidden = torch.tanh(self.body(hidden)).mean(1)
        return {"logits": self.head(-hidden if flip else hidden), "hidden": hidden}


def dictionary_loss(outputs: dict[str, Tensor], targets: dict[str, Any]) -> Tensor:
    return (
        F.cross_entropy(outputs["logits"], targets["labels"])
        + targets["weight"] * outputs["hidden"].square().mean()
    )


def dictionary_batch(*, flip: bool = False, weight: float = 0.1) -> tuple[dict[str, Any], dict[str, Any]]:
    inputs = {"words": torch.randint(9, (5, 3)), "weights": torch.rand(5, 3), "flip": flip}
    return inputs, {"labels": torch.randint(3, (5,)), "weight": weight}


def test_the_graph_holds_at_other_parameters_buffers_and_batches() -> None:
    model = Everything()
    plan = kfac_fx.inspect(model, dictionary_loss, *dictionary_batch())
    other = moved(model)
    other.shift, other.scale = torch.randn(4), torch.tensor(-0.7)
    inputs, targets = dictionary_batch()
    ours = evaluate(plan, other, inputs["words"], inputs["weights"], targets["labels"])
    same(ours, autograd(other, dictionary_loss, inputs, targets))


def test_plain_values_in_a_batch_are_part_of_what_is_captured() -> None:
    model = Everything()
    step = kfac_fx.compile(
        model,
        dictionary_loss,
        optimizer=torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0),
        backend="eager",
    )
    for flip, weight in ((False, 0.1), (True, 0.1), (True, 5.0), (False, 0.1)):
        batch = dictionary_batch(flip=flip, weight=weight)
        assert torch.equal(step(*batch), autograd(model, dictionary_loss, *batch)[0])


def test_a_buffer_that_is_replaced_between_steps_is_read_anew() -> None:
    model = Everything()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    step = kfac_fx.compile(model, dictionary_loss, optimizer=optimizer, backend="eager")
    for _ in range(3):
        batch = dictionary_batch()
        model.shift = torch.randn(4)
        assert torch.equal(step(*batch), autograd(model, dictionary_loss, *batch)[0])


def test_frozen_parameters_have_no_gradient_and_are_skipped_as_frozen() -> None:
    plan = kfac_fx.inspect(Everything(), dictionary_loss, *dictionary_batch())
    assert {s.parameter: s.reason for s in plan.skipped} == {
        "body.weight": kfac_fx.Reason.FROZEN,
        "body.bias": kfac_fx.Reason.FROZEN,
    }
    assert not set(plan.capture.gradients) & {"body.weight", "body.bias"}
    assert plan.coverage == 1.0


def test_tuple_inputs_are_positional_and_a_list_is_one_argument() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Linear(3, 2), nn.Linear(4, 2)

        def forward(self, x: Any, y: Tensor | None = None) -> Tensor:
            one, two = x if y is None else (x, y)
            return self.left(one) * self.right(two)

    model, one, two, y = Pair(), torch.randn(5, 3), torch.randn(5, 4), torch.randn(5, 2)
    for inputs in ((one, two), [one, two]):
        plan = kfac_fx.inspect(model, F.mse_loss, inputs, y)
        same(evaluate(plan, model, one, two, y), autograd(model, F.mse_loss, inputs, y))
        assert [node.name for node in plan.capture.inputs] == ["input_0", "input_1"]
        assert [node.name for node in plan.capture.targets] == ["target_0"]


# ---------------------------------------------------------------- names and lines


def placeholders(capture: Capture) -> list[str]:
    return [node.name for node in capture.graph.graph.find_nodes(op="placeholder")]


def test_placeholders_carry_the_names_of_parameters_buffers_inputs_and_targets() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3, bias=False))
    plan = kfac_fx.inspect(model, F.cross_entropy, torch.randn(5, 4), torch.randint(3, (5,)))
    assert placeholders(plan.capture) == [
        "p_0_weight",
        "p_0_bias",
        "p_1_weight",
        "p_1_bias",
        "p_2_weight",
        "b_1_running_mean",
        "b_1_running_var",
        "b_1_num_batches_tracked",
        "input_0",
        "target_0",
    ]
    assert [p.name for p in plan.capture.parameters] == [name for name, _ in model.named_parameters()]
    assert list(plan.capture.buffers) == [name for name, _ in model.named_buffers()]


def test_names_that_differ_only_by_punctuation_stay_apart() -> None:
    class Names(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a_b = nn.Linear(3, 3)
            self.a = nn.ModuleDict({"b": nn.Linear(3, 3)})

        def forward(self, x: Tensor) -> Tensor:
            return self.a_b(x) + 2 * torch.tanh(self.a["b"](x))

    model, x, y = Names(), torch.randn(5, 3), torch.randn(5, 3)
    plan = kfac_fx.inspect(model, F.mse_loss, x, y)
    assert len(set(placeholders(plan.capture))) == len(placeholders(plan.capture)) == 6
    same(evaluate(plan, model, x, y), autograd(model, F.mse_loss, x, y))


def test_a_tied_parameter_lists_its_other_names() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    plan = kfac_fx.inspect(model, F.mse_loss, torch.randn(5, 4), torch.randn(5, 4))
    assert plan.capture.parameter("0.weight").aliases == ("2.weight",)
    (match,) = [m for m in plan.matched if m.weight == "0.weight"]
    assert len(match.uses) == 2


class Written(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.raw = nn.Parameter(torch.randn(6, 3))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(x))
        return hidden @ self.raw


def test_source_lines_point_into_the_users_file() -> None:
    plan = kfac_fx.inspect(Written(), F.cross_entropy, torch.randn(5, 4), torch.randint(3, (5,)))
    lines, first = inspect.getsourcelines(Written.forward)
    for match in plan.matched:
        assert match.source is not None
        assert match.source.file == __file__
        code = "self.first(x)" if match.weight == "first.weight" else "hidden @ self.raw"
        number = next(i for i, line in enumerate(lines) if code in line)
        assert (match.source.line, match.source.code) == (first + number, lines[number].strip())
        assert str(match.source) == f"test_capture.py:{first + number}"


def test_no_node_of_the_forward_depends_on_the_seed() -> None:
    plan = kfac_fx.inspect(Written(), F.cross_entropy, torch.randn(5, 4), torch.randint(3, (5,)))
    capture = plan.capture
    assert capture.loss not in capture.backward
    assert set(capture.gradients.values()) <= capture.backward
    for match in plan.matched:
        assert all(use.a not in capture.backward and set(use.g) <= capture.backward for use in match.uses)


# ---------------------------------------------------------------- autocast


def test_autocast_in_the_model_and_around_it_gives_pytorchs_gradients() -> None:
    class Region(nn.Module):
        def __init__(self, *, inside: bool) -> None:
            super().__init__()
            self.first, self.last, self.inside = nn.Linear(4, 8), nn.Linear(8, 3), inside

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16) if self.inside else contextlib.nullcontext():
                hidden = torch.tanh(self.first(x))
            return self.last(hidden.to(self.last.weight.dtype))

    x, y = torch.randn(6, 4), torch.randint(3, (6,))
    for inside in (True, False):
        model = Region(inside=inside)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=not inside):
            plan = kfac_fx.inspect(model, F.cross_entropy, x, y)
            loss = F.cross_entropy(model(x), y)
        found = torch.autograd.grad(loss, list(model.parameters()))
        expected = dict(zip(dict(model.named_parameters()), found, strict=True))
        same(evaluate(plan, model, x, y), (loss.detach(), expected))
        assert plan.coverage == 1.0
        dtypes = {
            node.meta["val"].dtype for node in plan.capture.data if isinstance(node.meta.get("val"), Tensor)
        }
        assert torch.bfloat16 in dtypes


# ---------------------------------------------------------------- loss_fn=None


@dataclass
class Output:
    loss: Tensor
    logits: Tensor


class OwnLoss(nn.Module):
    def __init__(self, form: str) -> None:
        super().__init__()
        self.layer, self.form = nn.Linear(4, 3), form

    def forward(self, x: Tensor, labels: Tensor) -> Any:
        logits = self.layer(x)
        loss = F.cross_entropy(logits, labels)
        return {"attribute": Output(loss, logits), "key": {"loss": loss, "logits": logits}, "alone": loss}[
            self.form
        ]


@pytest.mark.parametrize("form", ["attribute", "key", "alone"])
@pytest.mark.parametrize("as_dict", [True, False])
def test_without_a_loss_function_the_models_own_loss_is_taken(form: str, as_dict: bool) -> None:
    model, x, labels = OwnLoss(form), torch.randn(5, 4), torch.randint(3, (5,))
    inputs = {"x": x, "labels": labels} if as_dict else (x, labels)
    plan = kfac_fx.inspect(model, None, inputs)
    expected = autograd(model.layer, F.cross_entropy, x, labels)
    assert torch.equal(evaluate(plan, model, x, labels)[0], expected[0])
    assert plan.capture.loss_info.kind == "cross_entropy"
    step = kfac_fx.compile(model, fisher="type2", backend="eager")
    assert torch.equal(step(inputs), expected[0])


@pytest.mark.parametrize(
    ("targets", "kind", "loss_fn"),
    [
        (torch.tensor([0, 2, 1, 1, 0]), "cross_entropy", F.cross_entropy),
        (torch.arange(15.0).view(5, 3), "mse", F.mse_loss),
    ],
)
def test_without_a_loss_function_the_targets_decide_and_the_plan_says_so(
    targets: Tensor, kind: str, loss_fn: Any
) -> None:
    model, x = nn.Linear(4, 3), torch.randn(5, 4)
    plan = kfac_fx.inspect(model, None, x, targets)
    same(evaluate(plan, model, x, targets), autograd(model, loss_fn, x, targets))
    assert plan.capture.loss_info.kind == kind
    assert "chosen" in plan.capture.loss_info.note
    assert plan.capture.loss_info.note in str(plan)


def test_hugging_face_models_train_on_their_own_loss() -> None:
    from tests import zoo

    example = zoo.MODELS["bert"]()
    plan = kfac_fx.inspect(example.model, None, example.inputs)
    assert plan.capture.loss_info.kind == "cross_entropy"
    assert torch.equal(evaluate(plan, example.model, *example.inputs.values())[0], zoo.loss(example).detach())


class CheckpointedNorm(nn.Module):
    """A BatchNorm inside a region that the backward computes again."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh())
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.utils.checkpoint.checkpoint(self.body, x, use_reentrant=False))


@pytest.mark.parametrize("fisher", ["mc", "type2"])
def test_the_passes_of_the_fisher_do_not_count_as_further_batches_of_a_norm(fisher: str) -> None:
    torch.manual_seed(0)
    plain, x, y = CheckpointedNorm(), torch.randn(6, 4), torch.randint(3, (6,))
    model = twin(plain)
    step = kfac_fx.compile(model, F.cross_entropy, fisher=fisher, backend="eager")  # type: ignore[arg-type]
    for _ in range(3):
        expected = F.cross_entropy(plain(x), y)
        expected.backward()
        step(x, y)
        plain.load_state_dict({**plain.state_dict(), **dict(model.named_parameters())})
    buffers = dict(plain.named_buffers())
    assert buffers["body.1.num_batches_tracked"] > 0
    for name, buffer in model.named_buffers():
        torch.testing.assert_close(buffer, buffers[name])
