"""Reads the roles of a graph's inputs off the graph: weights, latents, schedule, conditioning.

No name of an argument is looked at:

- a *weight* is held by the module;
- the *schedule* (timestep, sigma, guidance) is what goes through a sinusoid into a linear layer, and every scalar;
- a *latent* has the shape of an output (up to the channel dimension), one for each output; where no input has, it is
  the one whose tokens the blocks' main stream holds; where several have, it is only a guess;
- all other inputs are *conditioning*.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx
from torch._dynamo.source import TensorPropertySource
from torch.utils._pytree import tree_leaves

from fx_cache.patterns.graph import (
    ancestors,
    descendants,
    hinted_shape,
    is_tensor,
    is_weight,
    operation,
    same_shape,
    value_of,
)
from fx_cache.patterns.values import data_inputs, form_inputs

_SINUSOIDS = {"sin", "cos", "polar"}
_LINEAR = {"linear", "matmul", "addmm", "mm"}
_MAX_STEPS = 24
_FEW_STEPS = 4


@dataclass(frozen=True)
class InputRoles:
    """Positions of the graph's inputs by role.

    Attributes:
        latents: change at every step.
        schedule: small inputs that are compared by value; the timestep among them moves one way within a request.
        conditioning: stay the same objects within a request and branch.
        unseen: for each span, the inputs that reach it, and not its probe: a step with others computes, since the probe
            does not show them. The time may be one of them.
        shown: for each span, the inputs that its probe depends on.
        controls: the conditioning and the numbers that reach nothing but spans (ControlNet samples, inputs of single
            layers): with others a pass of a request is still the same.
        scalars: host numbers, compared by value; not the sizes of other inputs.
        weights: belong to the module.
        certain: whether the graph leaves no doubt which inputs are the latents.
        timed: those of the schedule of which the graph leaves no doubt that they are embedded as a time is.
    """

    latents: tuple[int, ...]
    schedule: tuple[int, ...]
    conditioning: tuple[int, ...]
    scalars: tuple[int, ...]
    weights: tuple[int, ...]
    unseen: tuple[tuple[int, ...], ...] = ()
    shown: tuple[tuple[int, ...], ...] = ()
    controls: tuple[int, ...] = ()
    certain: bool = False
    timed: tuple[int, ...] = ()


def classify_inputs(graph: fx.Graph) -> InputRoles:
    """The roles of a graph's inputs."""
    inputs = list(graph.find_nodes(op="placeholder"))
    weights = [i for i, n in enumerate(inputs) if is_weight(n)]
    given = [i for i, n in enumerate(inputs) if i not in weights and (is_tensor(n) or not _is_size(n))]
    tensors = [i for i in given if is_tensor(inputs[i])]
    timed = [i for i in given if _embedded_as_time(inputs[i])]
    schedule = [i for i in given if i in timed or (i in tensors and _looks_like_time(inputs[i]))]
    others = [i for i in tensors if i not in schedule]
    latents, certain = _latents(graph, inputs, others)
    return InputRoles(
        latents=tuple(latents),
        schedule=tuple(schedule),
        conditioning=tuple(i for i in others if i not in latents),
        scalars=tuple(i for i in given if i not in tensors and i not in schedule),
        weights=tuple(weights),
        certain=certain,
        timed=tuple(timed),
    )


def with_latents_from(roles: InputRoles, graph: fx.Graph, streams: Sequence[fx.Node]) -> InputRoles:
    """The roles, with the input whose tokens some streams hold as the latent if no input has the shape of an output.

    Where several inputs are joined in a stream, which of them is denoised is not known: then none is.
    """
    if roles.latents:
        return roles
    inputs = list(graph.find_nodes(op="placeholder"))
    held = {i for s in streams for i in roles.conditioning if inputs[i] in token_sources(s)}
    held = {i for i in held if value_of(inputs[i]).is_floating_point()}
    if len(held) != 1:
        return roles
    rest = tuple(i for i in roles.conditioning if i not in held)
    return replace(roles, latents=tuple(held), conditioning=rest, certain=True)


def with_controls(
    roles: InputRoles, graph: fx.Graph, spans: Sequence[Sequence[fx.Node]], probes: Sequence[fx.Node]
) -> InputRoles:
    """The roles, with what feeds only spans told apart. What asks an input for its form alone does not show it.

    Args:
        graph: the captured graph.
        spans: the nodes of each span.
        probes: for each span, the value that is compared from step to step.
    """
    inputs = list(graph.find_nodes(op="placeholder"))
    skipped = {n: k for k, span in enumerate(spans) for n in span}
    output = next(iter(graph.find_nodes(op="output")))
    shown: list[set[fx.Node]] = []
    for probe in probes:
        reached = ancestors(probe, stop=set(skipped), reads=data_inputs)
        # Past a span that is skipped go the streams that it starts with, of which its own probe shows all.
        shown.append(
            reached.union(*(shown[k] for k in {skipped[n] for n in reached if n in skipped} if k < len(shown)))
        )
    elsewhere = {n for probe in probes for n in ancestors(probe)} | ancestors(output, stop=set(skipped))
    unseen: list[list[int]] = [[] for _ in spans]
    # What looks like a time may be none: guidance is given and embedded just so.
    for i in sorted({*roles.latents, *roles.conditioning, *roles.scalars, *roles.schedule}):
        for k in sorted({skipped[n] for n in descendants(graph, [inputs[i]], reads=data_inputs) if n in skipped}):
            if inputs[i] not in shown[k]:
                unseen[k].append(i)
    reaching = {i for of_span in unseen for i in of_span}.intersection((*roles.conditioning, *roles.scalars))
    controls = tuple(i for i in sorted(reaching) if inputs[i] not in elsewhere)
    seen = tuple(tuple(i for i, n in enumerate(inputs) if n in of_span) for of_span in shown)
    return replace(roles, unseen=tuple(map(tuple, unseen)), shown=seen, controls=controls)


def _is_size(node: fx.Node) -> bool:
    """Whether a number is the size of an input: the input's shape says the same."""
    source = getattr(node.meta.get("grapharg"), "source", None)
    return isinstance(source, TensorPropertySource)


def _looks_like_time(node: fx.Node) -> bool:
    value = value_of(node)
    if value.is_complex() or value.is_quantized:
        return False
    return value.ndim == 0 or (value.ndim == 1 and value.is_floating_point())


def _embedded_as_time(node: fx.Node) -> bool:
    """Whether a short path leads from the input to a sinusoid, and from there to a linear layer.

    A rotary embedding goes through a sinusoid too, but is multiplied onto queries and keys instead.
    """
    return any(operation(user) in _LINEAR for _, user in _ends_of_sinusoids(node))


def sinusoids_of(node: fx.Node) -> set[fx.Node]:
    """The outputs that sinusoids of an input lead to: a linear layer in another graph may go on with them."""
    return {n for n, user in _ends_of_sinusoids(node) if user.op == "output"}


def goes_into_linear(node: fx.Node) -> bool:
    """Whether an input goes into a linear layer by itself, as the sinusoids of a time do."""
    frontier = [node]
    for _ in range(_FEW_STEPS):
        users = [(n, u) for n in frontier for u in n.users if n not in form_inputs(u)]
        if any(operation(u) in _LINEAR and u.args[:1] == (n,) for n, u in users):
            return True
        frontier = [u for n, u in users if u.all_input_nodes == [n] and is_tensor(u)]
    return False


def _ends_of_sinusoids(node: fx.Node) -> Iterator[tuple[fx.Node, fx.Node]]:
    """Where short paths from an input through a sinusoid end, a linear layer or an output, and what goes in there."""
    seen = {(node, False)}
    frontier = [(node, False)]
    for _ in range(_MAX_STEPS):
        following = []
        for n, curved in frontier:
            for user in n.users:
                if n in form_inputs(user):
                    continue
                if operation(user) in _LINEAR or user.op == "output":
                    if curved:
                        yield n, user
                    continue
                if curved and _widens(n, user):
                    continue
                state = (user, curved or operation(user) in _SINUSOIDS)
                if state not in seen:
                    seen.add(state)
                    following.append(state)
        frontier = following


def _widens(node: fx.Node, user: fx.Node) -> bool:
    """Whether `user` combines the value with a larger tensor, as a rotary embedding is with queries."""
    if not is_tensor(node) or not is_tensor(user):
        return False
    return value_of(user).ndim > max(value_of(node).ndim, 3)


def _latents(graph: fx.Graph, inputs: list[fx.Node], candidates: list[int]) -> tuple[list[int], bool]:
    """For each output the input of its shape; failing that, the one that differs from it in channels only.

    Also whether there is any, and no output for which it might have been another one.

    Sizes that are no numbers are compared as they are written. Outputs that no input fits then (``2 * (s0 // 2)`` out
    of ``s0``) are compared by the sizes of the present inputs, of which none may be left over.
    """
    results = [n for n in tree_leaves(next(iter(graph.find_nodes(op="output"))).args) if isinstance(n, fx.Node)]
    missing = [n for n in results if is_tensor(n)]
    free = [i for i in candidates if value_of(inputs[i]).is_floating_point()]
    found: dict[fx.Node, int] = {}
    certain = True
    for shape in (_written, _present):
        for result in list(missing):
            exact = [i for i in free if shape(inputs[i]) == shape(result)]
            near = [i for i in free if _near(inputs[i], shape(inputs[i]), shape(result))]
            alike = sum(shape(n) == shape(result) for n in missing)
            if (exact and (shape is _written or len(exact) <= alike)) or (not exact and len(near) == 1):
                certain = certain and len(exact) <= alike
                found[result] = (exact or near)[0]
                free.remove(found[result])
                missing.remove(result)
    return [found[n] for n in results if n in found], certain and bool(found)


def _written(node: fx.Node) -> tuple[Any, ...]:
    return tuple(map(str, value_of(node).shape))


def _present(node: fx.Node) -> tuple[Any, ...]:
    return hinted_shape(value_of(node))


def _near(node: fx.Node, a: Sequence[Any], b: Sequence[Any]) -> bool:
    """Whether an input has an output's shape but for its channels; what is convolved has them in dimension 1."""
    convolved = any(operation(u).startswith("conv") and u.args[:1] == (node,) for u in node.users)
    return differs_in_channels(a, b) and (not convolved or (a[0], *a[2:]) == (b[0], *b[2:]))


def differs_in_channels(a: Sequence[Any], b: Sequence[Any]) -> bool:
    """Whether two shapes differ in one dimension, which holds channels and not tokens, pixels or frames."""
    if len(a) != len(b):
        return False
    different = [d for d, (x, y) in enumerate(zip(a, b, strict=True)) if x != y]
    return len(different) == 1 and different[0] in ({len(a) - 1} if len(a) <= 3 else {1, 2, len(a) - 1})


def token_sources(node: fx.Node) -> set[fx.Node]:
    """The graph inputs whose tokens a value holds.

    Follows the data flow backwards; where a slice is taken out of a concatenation, only the operand that
    fills it.
    """

    def holds(n: fx.Node) -> Iterable[fx.Node]:
        part = _sliced_operand(n)
        if part is not None:
            return [part]
        form = form_inputs(n)
        return [a for a in n.all_input_nodes if a not in form]

    return {n for n in ancestors(node, reads=holds) if n.op == "placeholder"}


def _sliced_operand(node: fx.Node) -> fx.Node | None:
    """For ``cat([a, b], dim)[..., start:stop, ...]``, also through shape-preserving operations, the operand taken."""
    found = _cut(node)
    if found is None:
        return None
    source, dim, from_start = found
    while operation(source) not in ("cat", "concat"):
        parents = [a for a in source.all_input_nodes if is_tensor(a) and not is_weight(a) and same_shape(a, source)]
        if len(parents) != 1:
            return None
        source = parents[0]
    operands = source.args[0]
    cat_dim = source.kwargs.get("dim", source.args[1] if len(source.args) > 1 else 0)
    if not isinstance(operands, list | tuple) or not isinstance(cat_dim, int) or cat_dim % value_of(source).ndim != dim:
        return None
    sizes = [str(value_of(o).shape[dim]) for o in operands if isinstance(o, fx.Node)]
    taken = str(value_of(node).shape[dim])
    matching = [o for o, size in zip(operands, sizes, strict=False) if size == taken]
    if len(matching) == 1:
        return matching[0] if isinstance(matching[0], fx.Node) else None
    if len(operands) == 2 and len(sizes) == 2:
        chosen = operands[0] if from_start else operands[1]
        return chosen if isinstance(chosen, fx.Node) else None
    return None


def _cut(node: fx.Node) -> tuple[fx.Node, int, bool] | None:
    """For ``x[..., start:stop, ...]``: what is cut, in which dimension, and whether from its start."""
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node) or not is_tensor(node) or not is_tensor(source):
        return None
    if isinstance(node.target, torch._ops.OpOverload) and operation(node) == "slice":
        dim, start = (*node.args[1:3], None, None)[:2]
        whole = same_shape(node, source) or not isinstance(dim, int)
        return None if whole else (source, dim % value_of(source).ndim, not start)
    if node.target is not operator.getitem:
        return None
    item = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
    cuts = [(d, s) for d, s in enumerate(item) if isinstance(s, slice) and (s.start, s.stop) != (None, None)]
    if len(cuts) != 1 or any(not isinstance(s, slice) for s in item):
        return None
    ((dim, cut),) = cuts
    return source, dim, cut.start is None
