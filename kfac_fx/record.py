"""A traced step -> `Capture`: names for placeholders, facts about nodes, one training output.

Enters: the raw graph and what the trace learnt. Leaves: the frozen record that all later passes read.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.fx.graph import CodeGen

from kfac_fx import graph as fxgraph
from kfac_fx.batch import Batch, num_examples
from kfac_fx.loss_info import check_fisher, loss_info
from kfac_fx.passes import Trace
from kfac_fx.sources import user_source
from kfac_fx.traced import Capture, LossNodes, Parameter, Pass
from kfac_fx.types import Fisher, LossFn, Source


def make_capture(
    module: GraphModule,
    model: nn.Module,
    loss_fn: LossFn | None,
    batch: Batch,
    parameters: dict[str, nn.Parameter],
    buffers: dict[str, Tensor],
    fisher: Fisher,
    trace: Trace,
) -> Capture:
    """Name, clean and describe the traced step. Raises `LossError` if the loss does not fit the Fisher."""
    graph = module.graph
    _flatten_signature(module)
    placeholders = graph.find_nodes(op="placeholder")
    _name_placeholders(placeholders, [*parameters], [*buffers], batch)
    _drop_detach(graph)
    outputs = iter(fxgraph.tree_leaves(graph.output_node().args[0]))
    loss, inverse = next(outputs), next(outputs)
    call_losses, losses = _recorded(outputs, trace)
    passes = _passes(outputs, trace)
    _share_recomputed_randomness(graph, passes[0].seed)
    if len(passes) > 1:
        _keep_buffers(graph, [loss, *passes[0].gradients.values()])
    graph.output_node().args = ((loss, *passes[0].gradients.values()),)
    module.recompile()
    records = _parameters(model, parameters, placeholders)
    data = placeholders[len(parameters) + len(buffers) :]
    covered = _covers(loss, call_losses, [p.node for p in records if p.trainable])
    check_fisher(trace.calls, fisher, covered=covered)
    return Capture(
        graph=module,
        model_name=type(model).__name__,
        parameters=records,
        buffers=dict(zip(buffers, placeholders[len(parameters) :], strict=False)),
        inputs=tuple(data[: batch.num_inputs]),
        targets=tuple(data[batch.num_inputs :]),
        loss=loss,
        loss_info=loss_info(
            trace.calls, examples=num_examples(batch), covered=covered, chosen=loss_fn is None
        ),
        inverse_scale=inverse,
        losses=losses if covered else (),
        passes=tuple(passes),
        backward=fxgraph.descendants(seed for p in passes for seed in p.seeds),
        data=fxgraph.descendants(data),
        fisher=fisher,
        user_sources=_user_sources(records),
    )


def _recorded(outputs: Iterator[Node], trace: Trace) -> tuple[list[Node], tuple[LossNodes, ...]]:
    """(results, descriptions) of the recorded losses."""
    results, losses = [], []
    for call, weighted in zip(trace.calls, trace.weighted, strict=True):
        results.append(next(outputs))
        losses.append(
            LossNodes(
                kind=call.kind,
                class_dim=call.class_dim,
                prediction=next(outputs),
                inverse_scale=next(outputs),
                weight=next(outputs) if weighted else None,
            )
        )
    return results, tuple(losses)


def _passes(outputs: Iterator[Node], trace: Trace) -> list[Pass]:
    """The backward passes, each from its seeds and its gradients."""
    passes = []
    for losses, names in zip(trace.losses, trace.gradients, strict=True):
        seeds = tuple(next(outputs) for _ in losses or (None,))
        gradients = {name: next(outputs) for name in names}
        passes.append(Pass(seeds=seeds, losses=losses, gradients=gradients))
    return passes


def _flatten_signature(module: GraphModule) -> None:
    module.graph.set_codegen(CodeGen())


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
        args = fxgraph.tree_map(
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


def _keep_buffers(graph: Graph, training: list[Node]) -> None:
    """Let the Fisher's passes leave buffers alone: what they recompute of a checkpoint is no new batch."""
    order = {node: i for i, node in enumerate(graph.nodes)}
    last = max(order[node] for node in training)
    for node in [n for n in graph.nodes if order[n] > last]:
        if fxgraph.is_op(node, *fxgraph.BATCH_NORMS):
            node.args = (*node.args[:3], None, None, *node.args[5:])
        elif fxgraph.is_mutation(node) and not fxgraph.assigns_placeholder(node):
            changed = root = node.args[0]
            while isinstance(root, Node) and root.op == "call_function" and fxgraph.is_mutation(root):
                root = root.args[0]
            if isinstance(changed, Node) and isinstance(root, Node) and root.op == "placeholder":
                node.replace_all_uses_with(changed)
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
            source = user_source(node.meta.get("stack_trace"))
            if source is not None:
                found[parameter.name] = source
                break
            if node not in seen:
                seen.add(node)
                queue.extend(node.users if len(seen) < 20 else ())
    return found
