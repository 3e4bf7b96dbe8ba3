"""Every error is one clear message: what is wrong, by name, and what to do. A failed step changes nothing."""

import copy
import inspect
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F

import kfac_fx
from kfac_fx import errors
from tests.training import differing, plain_step, snapshot, twin


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3))


def batch(size: int = 5) -> tuple[Tensor, Tensor]:
    return torch.randn(size, 4), torch.randint(3, (size,))


def message(kind: type[errors.KfacFxError], action: Callable[..., Any], *args: Any, **options: Any) -> str:
    """The text of the error, which must be of this library's family and must not be a raw internal one."""
    with pytest.raises(kind) as caught:
        action(*args, **options)
    assert isinstance(caught.value, ValueError)
    text = str(caught.value)
    assert text.strip()
    return text


def said(text: str, *words: str) -> None:
    """All words stand in the message."""
    missing = [word for word in words if word not in text]
    assert not missing, f"{missing} not said in: {text}"


def line_of(function: Callable[..., Any], code: str) -> str:
    """`file.py:line` of the first line of `function` that holds `code`."""
    lines, first = inspect.getsourcelines(function)
    return f"test_errors.py:{first + next(i for i, line in enumerate(lines) if code in line)}"


# ---------------------------------------------------------------- capture


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.layer(x)
        if hidden.sum() > 0:
            hidden = -hidden
        return hidden


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.layer(x)
        return hidden * int(x.abs().max().item())


class Selecting(nn.Module):
    """The number of rows that the last layer reads depends on the data."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.last = nn.Linear(4, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.layer(x))
        kept = self.last(hidden[x[:, 0] > 0])
        return hidden + kept.sum(0)


@pytest.mark.parametrize(
    ("model", "code"),
    [
        (Branching, "if hidden.sum() > 0"),
        (Counting, ".item()"),
    ],
)
def test_a_data_dependent_model_names_the_users_line_and_a_remedy(model: type[nn.Module], code: str) -> None:
    step = kfac_fx.compile(model(), F.cross_entropy)
    text = message(errors.CaptureError, step, *batch())
    said(text, model.__name__, line_of(model.forward, code), code, "torch.where")
    message(errors.CaptureError, kfac_fx.inspect, model(), F.cross_entropy, *batch())


def test_a_number_of_rows_that_depends_on_the_data_is_right_or_refused_with_its_line() -> None:
    model = Selecting()
    other, (x, y) = twin(model), batch()
    x[:, 0] = torch.tensor([1.0, -1.0, 2.0, -2.0, 3.0])
    try:
        loss = kfac_fx.compile(model, F.cross_entropy, backend="eager")(x, y)
    except errors.CaptureError as error:
        said(str(error), "Selecting", line_of(Selecting.forward, "self.last(hidden"), "mask")
    else:
        assert torch.equal(loss, F.cross_entropy(other(x), y).detach())


def test_a_data_dependent_loss_names_its_line_too() -> None:
    def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
        loss = F.cross_entropy(outputs, targets)
        return loss if loss < 10 else loss * 0

    text = message(errors.CaptureError, kfac_fx.compile(net(), loss_fn), *batch())
    said(text, line_of(loss_fn, "loss < 10"), "torch.where")


def test_a_model_that_fails_by_itself_says_where_and_why() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(5, 3))
    text = message(errors.CaptureError, kfac_fx.compile(model, F.cross_entropy), *batch())
    said(text, "Sequential", "[5, 6]", "[5, 3]")
    assert "backward" not in text, "the forward failed"
    assert "float32" not in text, "the inputs are of the parameters' dtype"
    assert ".." not in text


def test_a_message_that_ends_with_a_full_stop_is_followed_by_one() -> None:
    class Refuses(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            raise ValueError(f"no use for {list(x.shape)}.")

    text = message(errors.CaptureError, kfac_fx.inspect, Refuses(4, 3), F.cross_entropy, *batch())
    said(text, "no use for [5, 4]. Check that")


class Grouped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.Parameter(torch.randn(2, 16, 16))

    def forward(self, x: Tensor) -> Tensor:
        return F.grouped_mm(x, self.experts, offs=torch.tensor([3, 5], dtype=torch.int32, device=x.device))


def torch_traces(model: nn.Module, x: Tensor) -> bool:
    """Whether this version of torch runs the model on fake tensors."""
    try:
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            model(mode.from_tensor(x))
    except RuntimeError:
        return False
    return True


def test_an_operator_that_cannot_be_traced_is_told_once_and_torch_logs_nothing() -> None:
    """Torch 2.15 traces this one; then its weight is skipped with the operator's name."""
    logger, seen = logging.getLogger("torch._subclasses.fake_tensor"), []
    handler = logging.Handler()
    handler.emit = lambda record: seen.append(record.getMessage())  # type: ignore[method-assign]
    model, x = Grouped(), torch.randn(5, 16)
    if torch_traces(model, x):
        (skip,) = kfac_fx.inspect(model, F.mse_loss, x, x).skipped
        said(f"{skip.reason.value} {skip.detail}", "no-pattern", "grouped_mm")
        return
    logger.addHandler(handler)
    try:
        text = message(errors.CaptureError, kfac_fx.inspect, model, F.mse_loss, x, x)
        assert not seen
        assert not torch_traces(model, x)
        assert "failed while attempting to run meta" in seen[0]  # torch's own habit, which comes back
    finally:
        logger.removeHandler(handler)
    said(text, "Grouped", line_of(Grouped.forward, "grouped_mm"), "set_experts_implementation('batched_mm')")


def test_a_model_without_parameters_is_refused() -> None:
    said(message(errors.KfacFxError, kfac_fx.compile, nn.Tanh(), F.cross_entropy), "Tanh", "no parameters")


def test_an_entirely_frozen_model_is_refused() -> None:
    model = net().requires_grad_(False)
    said(
        message(errors.KfacFxError, lambda: kfac_fx.compile(model, F.cross_entropy)(*batch())),
        "requires_grad",
    )


# ---------------------------------------------------------------- the loss


def test_a_loss_that_is_not_a_scalar() -> None:
    loss_fn = nn.CrossEntropyLoss(reduction="none")
    text = message(errors.LossError, kfac_fx.compile(net(), loss_fn), *batch())
    said(text, "scalar", "(5,)", ".mean()")


@pytest.mark.parametrize("value", [1.5, None, ("a",)])
def test_a_loss_that_is_not_a_tensor(value: Any) -> None:
    text = message(errors.LossError, kfac_fx.compile(net(), lambda outputs, targets: value), *batch())
    said(text, "tensor", type(value).__name__)


def test_a_loss_that_depends_on_no_parameter() -> None:
    def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs.detach(), targets)

    text = message(errors.LossError, kfac_fx.compile(net(), loss_fn), *batch())
    said(text, "does not depend", ".detach()")


def test_no_loss_function_and_nothing_to_guess_from() -> None:
    step = kfac_fx.compile(net())
    text = message(errors.LossError, step, torch.randn(5, 4), torch.randn(5, 7))
    said(text, "loss_fn=None", "Pass loss_fn")


def test_an_output_that_is_no_loss_without_loss_function_and_targets_says_so() -> None:
    text = message(errors.LossError, kfac_fx.inspect, net(), None, torch.randn(5, 4), None)
    said(text, "loss_fn and targets are None", "model's output", "(5, 3)", "Pass a loss_fn or targets")
    assert "Reduce" not in text


class Pair(nn.Linear):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return super().forward(x), x


def test_a_tuple_without_loss_function_and_targets_says_so() -> None:
    text = message(errors.LossError, kfac_fx.inspect, Pair(4, 3), None, torch.randn(5, 4), None)
    said(text, "loss_fn and targets are None", "tuple", "Pass a loss_fn or targets")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("index", [0, 1, 2, 5])
def test_a_loss_that_is_not_finite_changes_nothing(index: int, bad: float) -> None:
    """At every kind of step: refresh (0, 5), plain (1), statistics (2)."""
    model = net()
    method = kfac_fx.KFAC(statistics_every=2, inverse_every=5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    step = kfac_fx.compile(model, F.cross_entropy, method=method, optimizer=optimizer, backend="eager")
    good = [batch() for _ in range(8)]
    for one in good[:index]:
        step(*one)
    before = snapshot(model, step)
    spoiled = good[index][0].clone()
    spoiled[0, 0] = bad
    text = message(errors.NonFiniteLossError, step, spoiled, good[index][1])
    said(text, "nan", "unchanged", "learning rate")
    after = snapshot(model, step)
    # a refresh at step 0 fails before any curvature exists: only zero-initialised tensors may have appeared
    new = [name for name in after if name not in before]
    assert all(name.startswith("state.curvature") for name in new) and (index == 0 or not new)
    assert differing({name: after[name] for name in before}, before) == []
    assert all(parameter.grad is None for parameter in model.parameters())

    other = net()
    other.load_state_dict(model.state_dict())
    fresh_optimizer = torch.optim.AdamW(other.parameters(), lr=0.01)
    never = kfac_fx.compile(other, F.cross_entropy, method=method, optimizer=fresh_optimizer, backend="eager")
    if index:
        never.load_state_dict(copy.deepcopy(step.state_dict()))
    for one in good[index:]:
        assert torch.equal(step(*one), never(*one))
    assert differing(snapshot(model, step), snapshot(other, never)) == []


def test_a_non_finite_loss_while_accumulating_keeps_what_was_accumulated() -> None:
    model = net()
    other = twin(model)
    make = {
        m: kfac_fx.compile(
            m, F.cross_entropy, optimizer=torch.optim.SGD(m.parameters(), lr=0.1), backend="eager"
        )
        for m in (model, other)
    }
    good = [batch(), batch()]
    make[model].accumulate(*good[0])
    before = snapshot(model)
    message(errors.NonFiniteLossError, make[model].accumulate, torch.full((5, 4), float("nan")), good[1][1])
    assert differing(snapshot(model), before) == []
    make[model].accumulate(*good[1])
    make[model].update()
    for one in good:
        make[other].accumulate(*one)
    make[other].update()
    assert differing(snapshot(model, make[model]), snapshot(other, make[other])) == []


@pytest.mark.parametrize("fisher", ["type2", "mc"])
def test_an_exact_fisher_of_an_unknown_loss_says_that_empirical_works(fisher: str) -> None:
    def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
        return F.huber_loss(outputs, F.one_hot(targets, 3).float())

    step = kfac_fx.compile(net(), loss_fn, fisher=fisher)
    text = message(errors.LossError, step, *batch())
    said(text, fisher, "cross-entropy", "mean squared error", "BCE", "'empirical' works")
    assert torch.isfinite(kfac_fx.compile(net(), loss_fn, fisher="empirical")(*batch()))


def test_an_exact_fisher_of_a_loss_with_a_further_term_is_refused() -> None:
    model = net()

    def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs, targets) + 0.1 * model[0].weight.square().sum()

    said(
        message(errors.LossError, kfac_fx.compile(model, loss_fn, fisher="type2"), *batch()),
        "other terms",
        "'empirical'",
    )


# ---------------------------------------------------------------- optimizer


def test_an_optimizer_of_another_model() -> None:
    optimizer = torch.optim.SGD(net().parameters(), lr=0.1)
    text = message(
        errors.OptimizerMismatchError, kfac_fx.compile, net(), F.cross_entropy, optimizer=optimizer
    )
    said(text, "optimizer", "not parameters of the model", "model.parameters()")


def test_an_optimizer_that_lacks_parameters_names_them() -> None:
    model = net()
    optimizer = torch.optim.SGD(model[0].parameters(), lr=0.1)
    text = message(
        errors.OptimizerMismatchError, kfac_fx.compile, model, F.cross_entropy, optimizer=optimizer
    )
    said(text, "1.weight", "1.bias", "3.weight", "3.bias", "parameter group", "requires_grad_(False)")
    assert "0.weight" not in text


def test_an_optimizer_may_leave_out_frozen_parameters() -> None:
    model = net()
    model[0].requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    assert torch.isfinite(kfac_fx.compile(model, F.cross_entropy, optimizer=optimizer)(*batch()))


def test_a_parameter_unfrozen_after_compile_that_the_optimizer_lacks_is_named() -> None:
    model = net()
    model[0].requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    step = kfac_fx.compile(model, F.cross_entropy, optimizer=optimizer)
    step(*batch())
    model[0].requires_grad_(True)
    said(message(errors.OptimizerMismatchError, step, *batch()), "0.weight", "optimizer")


# ---------------------------------------------------------------- inputs


def test_inputs_of_another_dtype_name_both() -> None:
    x, y = batch()
    text = message(errors.KfacFxError, kfac_fx.compile(net(), F.cross_entropy), x.double(), y)
    said(text, "float64", "float32")


def test_integer_inputs_to_a_float_model_name_both() -> None:
    x, y = batch()
    text = message(errors.KfacFxError, kfac_fx.compile(net(), F.cross_entropy), x.long(), y)
    said(text, "int64", "float32")


def test_float_indices_for_an_embedding_are_explained() -> None:
    model = nn.Sequential(nn.Embedding(7, 4), nn.Flatten(), nn.Linear(8, 3))
    text = message(errors.KfacFxError, kfac_fx.compile(model, F.cross_entropy), torch.rand(5, 2), batch()[1])
    said(text, "float32", "Sequential")


def test_targets_of_the_wrong_dtype_are_explained() -> None:
    text = message(errors.KfacFxError, kfac_fx.compile(net(), F.cross_entropy), batch()[0], batch()[1].int())
    said(text, "loss_fn")


@pytest.mark.parametrize(("place", "name"), [(0, "input 0"), (1, "target 0")])
def test_a_tensor_on_another_device_is_named(place: int, name: str) -> None:
    tensors = list(batch())
    tensors[place] = tensors[place].to("meta")
    text = message(errors.InputError, kfac_fx.compile(net(), F.cross_entropy), *tensors)
    said(text, name, "meta", "cpu", ".to('cpu')")
    said(message(errors.InputError, kfac_fx.inspect, net(), F.cross_entropy, *tensors), name, "meta", "cpu")


def test_a_failed_first_step_changes_nothing_and_the_next_one_works() -> None:
    model, (x, y) = net(), batch()
    step = kfac_fx.compile(model, F.cross_entropy, backend="eager")
    before = snapshot(model)
    message(errors.KfacFxError, step, x.double(), y)
    message(errors.KfacFxError, step, torch.randn(5, 9), y)
    assert differing(snapshot(model), before) == []
    assert [p.requires_grad for p in model.parameters()] == [True] * 6
    other = twin(model)
    assert torch.equal(
        step(x, y), plain_step(other, F.cross_entropy, torch.optim.SGD(other.parameters(), lr=1), (x, y))
    )


# ---------------------------------------------------------------- parameters that cannot be preconditioned


class Partly(nn.Module):
    """One layer that is used, one that is not, one parameter that no layer kind knows."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.idle = nn.Linear(4, 3), nn.Linear(4, 3)
        self.power = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.sinh(self.power) ** 2 + self.used(x)


def test_a_parameter_without_a_gradient_is_reported_not_an_error() -> None:
    model = Partly()
    before = snapshot(model)
    step = kfac_fx.compile(model, F.cross_entropy, backend="eager")
    for _ in range(2):
        step(*batch())
    skipped = {skip.parameter: skip for skip in step.plan.skipped}
    assert {name for name, skip in skipped.items() if skip.reason is kfac_fx.Reason.UNUSED} == {
        "idle.weight",
        "idle.bias",
    }
    said(skipped["idle.weight"].advice, "remove it or use it")
    assert torch.equal(model.idle.weight, before["idle.weight"])
    said(str(step.plan), "idle.{weight,bias}", "unused")


def test_strict_raises_once_and_lists_everything() -> None:
    for action in (
        lambda: kfac_fx.compile(Partly(), F.cross_entropy, strict=True)(*batch()),
        lambda: kfac_fx.inspect(Partly(), F.cross_entropy, *batch(), strict=True),
    ):
        text = message(errors.UnsupportedModelError, action)
        said(text, "3 of 5", "idle.weight", "idle.bias", "power", "unused", "strict=True")
        assert "used.weight  " not in text.replace("idle", "")
    assert kfac_fx.inspect(net(), F.cross_entropy, *batch(), strict=True).coverage == 1.0


def test_strict_names_the_source_line_of_a_parameter() -> None:
    text = message(
        errors.UnsupportedModelError, kfac_fx.inspect, Partly(), F.cross_entropy, *batch(), strict=True
    )
    said(text, line_of(Partly.forward, "torch.sinh"))


# ---------------------------------------------------------------- the model changed


def test_a_model_that_changed_after_compile_is_named() -> None:
    def added(model: nn.Sequential) -> None:
        model.append(nn.Linear(3, 3))

    def removed(model: nn.Sequential) -> None:
        del model[3]

    def replaced(model: nn.Sequential) -> None:
        model[3].weight = nn.Parameter(torch.zeros(3, 6))

    def cast(model: nn.Sequential) -> None:
        model.double()

    words = {
        added: ("4.weight was added", "4.bias was added"),
        removed: ("3.weight was removed",),
        replaced: ("3.weight was replaced",),
        cast: ("0.weight was cast", "float64"),
    }
    for change, expected in words.items():
        model = net()
        step = kfac_fx.compile(model, F.cross_entropy, backend="eager")
        step(*batch())
        change(model)
        text = message(errors.ModelChangedError, step, *batch())
        said(text, "changed after compile", *expected, "kfac_fx.compile(model, ...) again")
        message(errors.ModelChangedError, step.accumulate, *batch())


def test_a_model_that_moved_to_another_device_is_named() -> None:
    model = net()
    step = kfac_fx.compile(model, F.cross_entropy)
    model.to("meta")
    said(message(errors.ModelChangedError, step, *batch()), "0.weight", "kfac_fx.compile(model, ...) again")


# ---------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("option", "value", "near"),
    [
        ("method", "kfacc", "kfac"),
        ("backend", "inducter", "inductor"),
        ("fisher", "emprical", "empirical"),
        ("sharing", "expnad", "expand"),
        ("exclude", ["3.wieght"], "3.weight"),
    ],
)
def test_an_unknown_name_gets_a_proposal(option: str, value: Any, near: str) -> None:
    text = message(errors.UnknownNameError, kfac_fx.compile, net(), F.cross_entropy, **{option: value})
    shown = value if isinstance(value, str) else value[0]
    said(text, f"{option}={shown!r}", f"Did you mean {near!r}?", "Known: ")
    if option != "backend":
        message(errors.UnknownNameError, kfac_fx.inspect, net(), F.cross_entropy, *batch(), **{option: value})


@pytest.mark.parametrize("method", [kfac_fx.KFAC, 3, None, object()])
def test_something_else_than_a_method_is_refused(method: Any) -> None:
    said(
        message(errors.UnknownNameError, kfac_fx.compile, net(), F.cross_entropy, method=method),
        "method=",
        "KFAC(",
    )


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("damping", -1.0),
        ("damping", float("nan")),
        ("damping", float("inf")),
        ("decay", 1.5),
        ("decay", -0.1),
        ("decay", float("nan")),
        ("statistics_every", 0),
        ("statistics_every", -3),
        ("inverse_every", 0),
        ("kl_clip", 0.0),
        ("kl_clip", -1e-3),
        ("kl_clip", float("nan")),
        ("max_factor_dim", 0),
    ],
)
def test_hyper_parameters_without_meaning_are_refused_by_name(option: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"KFAC\({option}={value}\): must"):
        kfac_fx.KFAC(**{option: value})


# ---------------------------------------------------------------- state and order of calls


def trained(model: nn.Module, inputs: Tensor) -> kfac_fx.TrainStep:
    step = kfac_fx.compile(model, lambda outputs, targets: outputs.square().mean(), backend="eager")
    step(inputs, None)
    return step


def test_a_state_that_is_none_says_what_it_lacks() -> None:
    step = trained(net(), torch.randn(5, 4))
    said(message(errors.StateError, step.load_state_dict, {"step": 3}), "curvature", "optimizer")


@pytest.mark.parametrize("used", [True, False])
def test_the_state_of_another_model_is_refused_by_name(used: bool) -> None:
    """Whether or not the step has run; if it has not, at its first batch at the latest."""
    state = trained(nn.Sequential(nn.Tanh(), nn.Linear(4, 2)), torch.randn(5, 4)).state_dict()
    x = torch.randn(5, 4)

    def load() -> None:
        model = nn.Sequential(nn.Linear(4, 3), nn.Tanh())
        if used:
            step = trained(model, x)
        else:
            step = kfac_fx.compile(model, lambda outputs, targets: outputs.square().mean(), backend="eager")
        step.load_state_dict(state)
        step(x, None)

    said(message(errors.StateError, load), "0.weight")


@pytest.mark.parametrize("used", [True, False])
def test_the_state_of_a_wider_model_is_refused_with_both_shapes(used: bool) -> None:
    state = trained(nn.Sequential(nn.Linear(4, 5)), torch.randn(5, 4)).state_dict()
    x = torch.randn(5, 4)

    def load() -> None:
        model = nn.Sequential(nn.Linear(4, 3))
        step = kfac_fx.compile(model, lambda outputs, targets: outputs.square().mean(), backend="eager")
        if used:
            step(x, None)
        step.load_state_dict(state)
        step(x, None)

    said(message(errors.StateError, load), "0.weight", "(1, 5, 5)", "(1, 3, 3)")


@pytest.mark.parametrize("frozen", [True, False])
def test_a_bias_that_is_frozen_or_unfrozen_later_is_named_with_both_remedies(frozen: bool) -> None:
    model, x = nn.Sequential(nn.Linear(4, 3)), torch.randn(5, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model[0].bias.requires_grad_(frozen)
    step = kfac_fx.compile(model, lambda f, y: f.square().mean(), optimizer=optimizer, backend="eager")
    step(x, None)
    model[0].bias.requires_grad_(not frozen)
    name = "the bias beside 0.weight was frozen" if frozen else "0.bias was frozen or unfrozen"
    said(message(errors.StateError, step, x, None), name, "requires_grad back", "kfac_fx.compile(model, ...)")
    model[0].bias.requires_grad_(frozen)
    step(x, None)
    kfac_fx.compile(model, lambda f, y: f.square().mean(), optimizer=optimizer, backend="eager")(x, None)


def test_the_state_of_another_optimizer_is_refused_and_nothing_is_loaded() -> None:
    x = torch.randn(5, 4)
    model, other = nn.Linear(4, 3), nn.Linear(4, 3)
    state = trained(model, x).state_dict()
    groups = [{"params": [other.weight]}, {"params": [other.bias]}]
    step = kfac_fx.compile(
        other, lambda f, y: f.square().mean(), optimizer=torch.optim.SGD(groups, lr=0.1), backend="eager"
    )
    step(x, None)
    before = snapshot(other, step)
    said(message(errors.StateError, step.load_state_dict, state), "optimizer")
    assert differing(snapshot(other, step), before) == []


def test_update_without_accumulate_says_what_to_call() -> None:
    step = trained(net(), torch.randn(5, 4))
    said(message(errors.KfacFxError, step.update), "update()", "accumulate(inputs, targets) first")


def test_a_step_while_batches_wait_says_what_to_call() -> None:
    model = net()
    step = kfac_fx.compile(model, F.cross_entropy, backend="eager")
    before = snapshot(model)
    step.accumulate(*batch())
    buffers = snapshot(model)
    said(message(errors.KfacFxError, step, *batch()), "accumulated", "step.update()", "step.discard()")
    said(message(errors.KfacFxError, step.state_dict), "accumulated", "step.update() first")
    assert differing(snapshot(model), buffers) == []
    assert set(differing(buffers, before)) == {"1.running_mean", "1.running_var", "1.num_batches_tracked"}
    step.update()
    assert step.state_dict()["step"] == 1


def test_the_plan_before_the_first_step_says_when_tracing_happens() -> None:
    step = kfac_fx.compile(net(), F.cross_entropy)
    said(message(errors.KfacFxError, lambda: step.plan), "first call")
    said(message(errors.KfacFxError, lambda: step.graphs), "first call")


def test_an_unknown_graph_is_a_key_error_that_names_the_graphs() -> None:
    step = trained(net(), torch.randn(5, 4))
    assert {"plain", "statistics"} <= set(step.graphs)
    with pytest.raises(KeyError, match="statstics"):
        step.graphs["statstics"]


def test_a_batch_without_examples_is_refused_with_its_shape() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 2))
    step = kfac_fx.compile(model, nn.functional.cross_entropy)
    x, y = torch.randn(3, 1, 4, 4), torch.tensor([0, 1, 0])
    step(x, y)
    with pytest.raises(errors.InputError, match=r"input 0 has no examples: its shape is \(0, 1, 4, 4\)"):
        step(x[:0], y[:0])


@pytest.mark.parametrize("loss", [F.cross_entropy, F.binary_cross_entropy_with_logits, F.mse_loss])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_prediction_that_is_not_finite_is_told_by_the_loss_where_targets_are_drawn(
    loss: Any, bad: float
) -> None:
    """Torch refuses to draw from such probabilities, on CUDA without a way back."""
    torch.manual_seed(0)
    model, x = nn.Linear(4, 3), torch.randn(5, 4)
    targets = torch.randint(3, (5,)) if loss is F.cross_entropy else torch.rand(5, 3)
    step = kfac_fx.compile(model, loss, method=kfac_fx.KFAC(statistics_every=1), fisher="mc", backend="eager")
    step(x, targets)
    before = copy.deepcopy(model.state_dict())
    message(errors.NonFiniteLossError, step, torch.full_like(x, bad), targets)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert torch.isfinite(step(x, targets))
