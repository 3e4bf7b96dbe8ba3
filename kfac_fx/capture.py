"""Model + loss + example batch -> `Capture`: forward, loss and backward as one graph with names.

Whole-graph tracing with fake tensors: nothing of the model is run on real data and nothing of it is changed.
The backward passes of the Fisher follow the training backward in the same graph.
"""

from __future__ import annotations

import contextlib
import re
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, final

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

from kfac_fx import graph as fxgraph
from kfac_fx.errors import CaptureError, KfacFxError, LossError
from kfac_fx.loss import (
    LossCall,
    LossRecorder,
    root_cotangents,
    sampled_cotangent,
    scaled_terms,
)
from kfac_fx.types import Capture, Fisher, LossFn, LossInfo, Parameter, Pass, Source

MAX_TYPE2_PASSES = 256


@final
@dataclass(frozen=True, kw_only=True)
class Batch:
    """Inputs and targets as a flat list of tensors, and the rest (structure, plain numbers) as a constant."""

    tensors: tuple[Tensor, ...]
    num_inputs: int
    rest: tuple[Any, ...]
    spec: Any

    def rebuild(self, tensors: tuple[Tensor, ...]) -> tuple[Any, Any]:
        """(inputs, targets) with these tensors in the places of the batch's own."""
        source = iter(tensors)
        leaves = [next(source) if leaf is _TENSOR else leaf for leaf in self.rest]
        inputs, targets = pytree.tree_unflatten(leaves, self.spec)
        return inputs, targets


class _TensorMark:
    def __repr__(self) -> str:
        return "tensor"


_TENSOR = _TensorMark()


def flatten_batch(inputs: Any, targets: Any) -> Batch:
    """Separate the tensors of a batch from its structure."""
    leaves, spec = pytree.tree_flatten((inputs, targets))
    tensors = tuple(leaf for leaf in leaves if isinstance(leaf, Tensor))
    rest = tuple(_TENSOR if isinstance(leaf, Tensor) else leaf for leaf in leaves)
    num_inputs = sum(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(inputs))
    return Batch(tensors=tensors, num_inputs=num_inputs, rest=rest, spec=spec)


def call_model(model: Callable[..., Any], inputs: Any) -> Any:
    """A tensor is one positional argument, a tuple several, a dict keywords."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def default_loss(outputs: Any, targets: Any) -> Tensor:
    """The loss when none is given.

    The model's own, else cross-entropy or mean squared error by the targets' type.
    """
    if isinstance(outputs, Mapping) and outputs.get("loss") is not None:
        return outputs["loss"]
    if not isinstance(outputs, Tensor) and getattr(outputs, "loss", None) is not None:
        return outputs.loss
    if isinstance(outputs, Tensor) and targets is None:
        return outputs
    if isinstance(outputs, Tensor) and isinstance(targets, Tensor):
        if not targets.is_floating_point() and outputs.is_floating_point():
            return nn.functional.cross_entropy(outputs, targets)
        if targets.shape == outputs.shape:
            return nn.functional.mse_loss(outputs, targets)
    raise LossError(
        "loss_fn=None: the model's output is neither a loss nor carries .loss, and the targets fit neither "
        "cross-entropy (integer targets) nor mean squared error (targets of the output's shape). Pass loss_fn."
    )


@final
@dataclass(kw_only=True)
class _Trace:
    """What the traced function learns while it runs: positions in its output list, filled once."""

    gradients: list[tuple[str, ...]] = field(default_factory=list)
    calls: list[LossCall] = field(default_factory=list)
    loss_kind: str = ""


def capture(
    model: nn.Module,
    loss_fn: LossFn | None,
    batch: Batch,
    *,
    fisher: Fisher = "empirical",
    exclude: Callable[[str], bool] = lambda name: False,
) -> Capture:
    """Trace one training step of `model` on a batch of these shapes.

    The model's mode (train or eval), the active autocast state and each parameter's requires_grad are part of
    what is captured. Raises `CaptureError` with the user's line if the model cannot be written as one graph,
    `LossError` if the loss is not a differentiable scalar or does not fit `fisher`.
    """
    parameters = dict(model.named_parameters())
    buffers = dict(model.named_buffers())
    trace = _Trace()
    joint = _joint_function(model, loss_fn, batch, parameters, buffers, fisher, trace)
    flat = [*parameters.values(), *buffers.values(), *batch.tensors]
    with _tracing_context(model):
        try:
            module = make_fx(
                joint, tracing_mode="fake", _allow_non_fake_inputs=True, record_stack_traces=True
            )(*flat)
        except KfacFxError:
            raise
        except Exception as error:
            raise _explain(error, model, batch) from error
    return _assemble(module, model, loss_fn, batch, parameters, buffers, fisher, trace)


def _joint_function(
    model: nn.Module,
    loss_fn: LossFn | None,
    batch: Batch,
    parameters: dict[str, nn.Parameter],
    buffers: dict[str, Tensor],
    fisher: Fisher,
    trace: _Trace,
) -> Callable[..., tuple[Tensor, ...]]:
    names, buffer_names = list(parameters), list(buffers)
    num_fixed = len(names) + len(buffer_names)

    def joint(*flat: Tensor) -> tuple[Tensor, ...]:
        trained = {
            name: tensor.detach().requires_grad_(parameters[name].requires_grad)
            for name, tensor in zip(names, flat, strict=False)
        }
        state = {**trained, **dict(zip(buffer_names, flat[len(names) : num_fixed], strict=True))}
        inputs, targets = batch.rebuild(flat[num_fixed:])

        def run() -> tuple[Tensor, ...]:
            with torch.enable_grad(), LossRecorder() as recorder:
                outputs = call_model(model, inputs)
                loss = (loss_fn or default_loss)(outputs, targets)
            _check_loss(loss)
            leaves = {name: tensor for name, tensor in trained.items() if tensor.requires_grad}
            with _no_autocast():
                return _backward_passes(loss, leaves, recorder.calls, fisher, batch, trace)

        # The backward must run inside too: activation checkpointing calls the model again from there.
        bound = {f"model.{name}": tensor for name, tensor in state.items()}
        return torch.func.functional_call(_Step(model, run), bound, ())

    return joint


@final
class _Step(nn.Module):
    """Runs a whole training step while its submodule's parameters are replaced."""

    def __init__(self, model: nn.Module, run: Callable[[], tuple[Tensor, ...]]) -> None:
        super().__init__()
        self.model = model
        self.run = run

    def forward(self) -> tuple[Tensor, ...]:
        """The step's results."""
        return self.run()


def _backward_passes(
    loss: Tensor,
    leaves: dict[str, Tensor],
    calls: list[LossCall],
    fisher: Fisher,
    batch: Batch,
    trace: _Trace,
) -> tuple[Tensor, ...]:
    """loss, 1/R_, call losses, then per pass: its seed and its gradients. Called while tracing."""
    slopes = _slopes(loss, calls)
    seed = torch.ones_like(loss)
    outputs = [seed, *_gradients([loss], [seed], leaves, trace)]
    with torch.no_grad():
        scaled = [scaled_terms(call, slope) for call, slope in slopes]
        inverse = _inverse_scale([pair[0] for pair in scaled], loss, batch)
    trace.calls = [call for call, _ in slopes]
    if fisher != "empirical":
        for predictions, seeds in _fisher_seeds(trace.calls, scaled, inverse, fisher):
            outputs += [seeds[0], *_gradients(predictions, seeds, leaves, trace)]
    return (loss, inverse, *(call.loss for call in trace.calls), *outputs)


def _gradients(
    outputs: list[Tensor], seeds: list[Tensor], leaves: dict[str, Tensor], trace: _Trace
) -> list[Tensor]:
    found = torch.autograd.grad(outputs, list(leaves.values()), seeds, retain_graph=True, allow_unused=True)
    present = {name: grad for name, grad in zip(leaves, found, strict=True) if grad is not None}
    trace.gradients.append(tuple(present))
    return list(present.values())


def _slopes(loss: Tensor, calls: list[LossCall]) -> list[tuple[LossCall, Tensor]]:
    """Derivative of the final loss with respect to each recorded call.

    Calls that the loss ignores are dropped.
    """
    used = []
    for call in calls:
        if not call.loss.requires_grad or not call.prediction.requires_grad:
            continue
        (slope,) = torch.autograd.grad(loss, [call.loss], retain_graph=True, allow_unused=True)
        if slope is not None:
            used.append((call, slope.detach()))
    return used


def _inverse_scale(inverses: list[Tensor], loss: Tensor, batch: Batch) -> Tensor:
    """1/R_ of the whole loss; of an unknown loss N, as for a mean over the batch."""
    if inverses:
        wide = [value.to(torch.promote_types(loss.dtype, torch.float32)) for value in inverses]
        return wide[0] if len(wide) == 1 else torch.stack(wide).mean()
    size = float(num_examples(batch))
    return torch.full((), size, dtype=torch.promote_types(loss.dtype, torch.float32), device=loss.device)


def _fisher_seeds(
    calls: list[LossCall], scaled: list[tuple[Tensor, Tensor | None]], inverse: Tensor, fisher: Fisher
) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Per pass the predictions and cotangents, scaled so that G is `inverse * sum g g^T` as for the training pass."""

    def scale(cotangent: Tensor, own_inverse: Tensor) -> Tensor:
        return cotangent * (1.0 / (inverse * own_inverse).sqrt()).to(cotangent.dtype)

    with torch.no_grad():
        if fisher == "mc":
            seeds = [
                scale(sampled_cotangent(call, weights), own)
                for call, (own, weights) in zip(calls, scaled, strict=True)
            ]
            yield [call.prediction for call in calls], seeds
            return
        for call, (own, weights) in zip(calls, scaled, strict=True):
            for cotangent in root_cotangents(call, weights):
                yield [call.prediction], [scale(cotangent, own)]


def _check_loss(loss: Any) -> None:
    if not isinstance(loss, Tensor):
        raise LossError(f"the loss must be a tensor, but loss_fn returned {type(loss).__name__}.")
    if loss.dim() != 0:
        remedy = "Reduce it, for example with .mean()."
        raise LossError(f"the loss must be a scalar, but it has shape {tuple(loss.shape)}. {remedy}")
    if not loss.requires_grad:
        raise LossError(
            "the loss does not depend on any trainable parameter: check requires_grad and .detach()."
        )


def num_examples(batch: Batch) -> int:
    """N: the leading dimension of the first input (else target) that has one."""
    return next((int(t.shape[0]) for t in batch.tensors if t.dim() > 0), 1)


def _assemble(
    module: GraphModule,
    model: nn.Module,
    loss_fn: LossFn | None,
    batch: Batch,
    parameters: dict[str, nn.Parameter],
    buffers: dict[str, Tensor],
    fisher: Fisher,
    trace: _Trace,
) -> Capture:
    graph = module.graph
    _flatten_signature(module)
    outputs = list(pytree.tree_leaves(graph.output_node().args[0]))
    loss, inverse = outputs[:2]
    call_losses = outputs[2 : 2 + len(trace.calls)]
    passes, position = [], 2 + len(trace.calls)
    for names in trace.gradients:
        seed = outputs[position]
        found = outputs[position + 1 : position + 1 + len(names)]
        passes.append(Pass(seed=seed, gradients=dict(zip(names, found, strict=True))))
        position += 1 + len(names)
    placeholders = graph.find_nodes(op="placeholder")
    _name_placeholders(placeholders, [*parameters], [*buffers], batch)
    _drop_detach(graph)
    _share_recomputed_randomness(graph, passes[0].seed)
    graph.output_node().args = ((loss, *passes[0].gradients.values()),)
    module.recompile()
    records = _parameters(model, parameters, placeholders)
    data = placeholders[len(parameters) + len(buffers) :]
    trainable = [p.node for p in records if p.trainable]
    return Capture(
        graph=module,
        model_name=type(model).__name__,
        parameters=records,
        buffers=dict(zip(buffers, placeholders[len(parameters) :], strict=False)),
        inputs=tuple(data[: batch.num_inputs]),
        targets=tuple(data[batch.num_inputs :]),
        loss=loss,
        loss_info=_loss_info(loss_fn, batch, trace, fisher, _covers(loss, call_losses, trainable)),
        inverse_scale=inverse,
        passes=tuple(passes),
        backward=fxgraph.descendants(p.seed for p in passes),
        data=fxgraph.descendants(data),
        fisher=fisher,
        user_sources=_user_sources(records),
    )


def _flatten_signature(module: GraphModule) -> None:
    module.graph.set_codegen(torch.fx.graph.CodeGen())


def _name_placeholders(
    placeholders: list[Node], parameters: list[str], buffers: list[str], batch: Batch
) -> None:
    num_targets = len(batch.tensors) - batch.num_inputs
    names = [f"p_{n}" for n in parameters] + [f"b_{n}" for n in buffers]
    names += [f"input_{i}" for i in range(batch.num_inputs)] + [f"target_{i}" for i in range(num_targets)]
    for node, name in zip(placeholders, names, strict=True):
        clean = re.sub(r"\W", "_", name)
        node._rename(clean)
        node.target = node.name
        if name[:2] in ("p_", "b_"):
            node.meta["kfac_fx"] = f"{'parameter' if name[0] == 'p' else 'buffer'} {name[2:]}"


def _drop_detach(graph: Graph) -> None:
    for node in list(graph.nodes):
        if fxgraph.is_op(node, torch.ops.aten.detach.default):
            node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
            graph.erase_node(node)


def _share_recomputed_randomness(graph: Graph, seed: Node) -> None:
    """Give the recomputation of a checkpointed region the random numbers of its first run.

    A random operator after the seed that does not depend on it is a recomputation. It reads the same values
    as its first run, so equal value numbers find the pair (autograd restores the generator's state instead).
    In-place operators on a shared result have run already and are shared too.
    """
    numbers: dict[Any, int] = {}
    numbering: dict[Node, int] = {}
    first_runs: dict[int, list[Node]] = {}
    taken: dict[int, int] = {}
    shared: set[Node] = set()
    backward = fxgraph.descendants([seed])
    after = False
    for node in list(graph.nodes):
        after = after or node is seed
        if node.op != "call_function" or node in backward:
            numbering[node] = numbers.setdefault(node, len(numbers))
            continue
        args = pytree.tree_map(
            lambda a: ("node", numbering[a]) if isinstance(a, Node) else repr(a), node.args
        )
        number = numbers.setdefault((node.target, repr(args), repr(node.kwargs)), len(numbers))
        numbering[node] = number
        if not fxgraph.has_effect(node):
            continue
        runs = first_runs.setdefault(number, [])
        if not after:
            runs.append(node)
        elif runs and (fxgraph.is_random(node) or node.args[0] in shared):
            first = runs[taken.get(number, 0) % len(runs)]
            taken[number] = taken.get(number, 0) + 1
            shared.add(first)
            node.replace_all_uses_with(first)
            graph.erase_node(node)


def _covers(loss: Node, call_losses: list[Node], trainable: list[Node]) -> bool:
    """Whether the loss depends on trainable parameters through the recorded calls alone."""
    stop, seen, queue = set(call_losses), set(), [loss]
    while queue:
        node = queue.pop()
        if node in seen or node in stop:
            continue
        seen.add(node)
        queue.extend(node.all_input_nodes)
    return bool(call_losses) and not seen.intersection(trainable)


def _loss_info(
    loss_fn: LossFn | None, batch: Batch, trace: _Trace, fisher: Fisher, covered: bool
) -> LossInfo:
    examples = num_examples(batch)
    if fisher != "empirical" and not covered:
        raise LossError(
            f"fisher={fisher!r} needs a loss made of cross-entropy, mean squared error or BCE-with-logits calls alone, "
            f"but this loss has {'other terms beside them' if trace.calls else 'none of them'}. "
            "fisher='empirical' works with every loss."
        )
    if not trace.calls:
        note = f"unknown loss, taken as a mean over the {examples} examples of the batch"
        return LossInfo(kind="unknown", reduction="unknown", examples=examples, terms=1, note=note)
    call = trace.calls[0]
    terms = max(1, call.num_terms // examples)
    note = f"{call.kind} ({call.reduction}), {examples} examples x {terms} terms"
    if loss_fn is None:
        note += ", chosen by the model's output and targets"
    if not covered:
        note += ", with further terms"
    kinds = {c.kind for c in trace.calls}
    kind = call.kind if len(kinds) == 1 else "several"
    return LossInfo(kind=kind, reduction=call.reduction, examples=examples, terms=terms, note=note)


def _parameters(
    model: nn.Module, parameters: dict[str, nn.Parameter], placeholders: list[Node]
) -> tuple[Parameter, ...]:
    aliases: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        aliases.setdefault(id(parameter), []).append(name)
    return tuple(
        Parameter(
            name=name,
            aliases=tuple(a for a in aliases[id(p)] if a != name),
            shape=tuple(p.shape),
            dtype=p.dtype,
            trainable=p.requires_grad,
            node=node,
        )
        for (name, p), node in zip(parameters.items(), placeholders, strict=False)
    )


def _user_sources(parameters: tuple[Parameter, ...]) -> dict[str, Source]:
    """The user's line that first uses each parameter."""
    found = {}
    for parameter in parameters:
        queue, seen = list(parameter.node.users), set()
        while queue:
            node = queue.pop(0)
            source = fxgraph.user_source(node.meta.get("stack_trace"))
            if source is not None:
                found[parameter.name] = source
                break
            if node not in seen:
                seen.add(node)
                queue.extend(node.users if len(seen) < 20 else ())
    return found


@contextlib.contextmanager
def _tracing_context(model: nn.Module) -> Iterator[None]:
    """Decompose fused recurrent kernels (they hide the products); keep autocast from caching traced casts."""
    recurrent = any(isinstance(m, nn.RNNBase | nn.RNNCellBase) for m in model.modules())
    cached = torch.is_autocast_cache_enabled()
    with contextlib.ExitStack() as stack:
        if recurrent:
            stack.enter_context(torch.backends.mkldnn.flags(enabled=False))
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        torch.set_autocast_cache_enabled(False)
        try:
            yield
        finally:
            torch.set_autocast_cache_enabled(cached)


@contextlib.contextmanager
def _no_autocast() -> Iterator[None]:
    """Autograd runs each backward in the dtype of its forward; an active autocast would cast it again."""
    with contextlib.ExitStack() as stack:
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


def _explain(error: Exception, model: nn.Module, batch: Batch) -> CaptureError:
    """One message with the user's line and the remedy for whatever tracing raised."""
    where = _user_line(error)
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    kind = type(error).__name__
    if "DataDependent" in kind or "GuardOnDataDependent" in kind or "trying to get a value out" in str(error):
        problem = (
            "the value of a tensor decides what Python does next (an if, int(), .item() or a loop bound)"
        )
        remedy = "Use torch.where, a mask, or move the decision out of the model."
    elif "use_reentrant" in str(error) or "Checkpointing is not compatible" in str(error):
        problem = "reentrant activation checkpointing cannot be captured"
        remedy = "Call torch.utils.checkpoint.checkpoint(..., use_reentrant=False)."
    else:
        problem = f"{kind}: {first}"
        remedy = _input_hint(model, batch)
    return CaptureError(
        f"{type(model).__name__} cannot be captured as one graph, {where}: {problem}. {remedy}"
    )


def _user_line(error: Exception) -> str:
    own = [f for f in traceback.extract_tb(error.__traceback__) if not _is_library(f.filename)]
    return f"at {own[-1].filename}:{own[-1].lineno} ({own[-1].line})" if own else "in the backward pass"


def _is_library(filename: str) -> bool:
    return filename.startswith((fxgraph._TORCH_ROOT, fxgraph._OWN_ROOT)) or filename.startswith("<")


def _input_hint(model: nn.Module, batch: Batch) -> str:
    parameter = next(iter(model.parameters()), None)
    dtypes = sorted({str(t.dtype).removeprefix("torch.") for t in batch.tensors[: batch.num_inputs]})
    own = (
        ""
        if parameter is None
        else f" The model's parameters are {str(parameter.dtype).removeprefix('torch.')}"
    )
    return f"Check that model(inputs) and loss_fn(outputs, targets) run.{own}; the inputs are {', '.join(dtypes)}."
