"""Reads the roles of a graph's inputs off the graph: weights, latents, schedule, conditioning.

No name of an argument is looked at:

- a *weight* is held by the module;
- the *schedule* (timestep, sigma, guidance) is what goes through a sinusoid into a linear layer, and every scalar;
- a *latent* has the shape of an output (up to the channel dimension), one for each output;
- all other inputs are *conditioning*.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
from torch import fx
from torch._dynamo.source import TensorPropertySource
from torch.utils._pytree import tree_leaves

from fx_cache.patterns.graph import ancestors, is_tensor, is_weight, same_shape, value_of

_SINUSOIDS = {torch.sin, torch.cos, "sin", "cos", torch.polar}
_LINEAR = {torch.nn.functional.linear, torch._C._nn.linear, torch.matmul, torch.addmm, torch.mm, operator.matmul}
_LINEAR_METHODS = {"matmul", "mm", "addmm"}
_MAX_STEPS = 24


@dataclass(frozen=True)
class InputRoles:
    """Positions of the graph's inputs by role.

    Attributes:
        latents: change at every step.
        schedule: small inputs that are compared by value; the timestep among them moves one way within a request.
        conditioning: stay the same objects within a request and branch.
        scalars: host numbers, compared by value; not the sizes of other inputs.
        weights: belong to the module.
    """

    latents: tuple[int, ...]
    schedule: tuple[int, ...]
    conditioning: tuple[int, ...]
    scalars: tuple[int, ...]
    weights: tuple[int, ...]


def classify_inputs(graph: fx.Graph) -> InputRoles:
    """The roles of a graph's inputs."""
    inputs = list(graph.find_nodes(op="placeholder"))
    weights = [i for i, n in enumerate(inputs) if is_weight(n)]
    numbers = [i for i, n in enumerate(inputs) if i not in weights and not is_tensor(n)]
    scalars = [i for i in numbers if not _is_size(inputs[i])]
    tensors = [i for i, n in enumerate(inputs) if i not in weights and is_tensor(n)]
    schedule = [i for i in tensors if _is_schedule(inputs[i])]
    others = [i for i in tensors if i not in schedule]
    latents = _latents(graph, inputs, others)
    conditioning = [i for i in others if i not in latents]
    return InputRoles(*map(tuple, (latents, schedule, conditioning, scalars, weights)))


def _is_size(node: fx.Node) -> bool:
    """Whether a number is the size of an input: the input's shape says the same."""
    source = getattr(node.meta.get("grapharg"), "source", None)
    return isinstance(source, TensorPropertySource)


def _is_schedule(node: fx.Node) -> bool:
    value = value_of(node)
    if value.ndim == 0:
        return True
    if value.is_floating_point() and value.ndim == 1:
        return True
    return value.ndim <= 2 and _through_sinusoid_to_linear(node)


def _through_sinusoid_to_linear(node: fx.Node) -> bool:
    """Whether a short path leads from the input to a sinusoid, and from there to a linear layer.

    A rotary embedding goes through a sinusoid too, but is multiplied onto queries and keys instead.
    """
    seen = {(node, False)}
    frontier = [(node, False)]
    for _ in range(_MAX_STEPS):
        following = []
        for n, curved in frontier:
            for user in n.users:
                if curved and (user.target in _LINEAR or (user.op == "call_method" and user.target in _LINEAR_METHODS)):
                    return True
                if not curved and user.target in _LINEAR:
                    continue
                if curved and _widens(n, user):
                    continue
                state = (user, curved or user.target in _SINUSOIDS)
                if state not in seen:
                    seen.add(state)
                    following.append(state)
        frontier = following
    return False


def _widens(node: fx.Node, user: fx.Node) -> bool:
    """Whether `user` combines the value with a larger tensor, as a rotary embedding is with queries."""
    if not is_tensor(node) or not is_tensor(user):
        return False
    return value_of(user).ndim > max(value_of(node).ndim, 3)


def _latents(graph: fx.Graph, inputs: list[fx.Node], candidates: list[int]) -> list[int]:
    output = next(iter(graph.find_nodes(op="output")))
    found: list[int] = []
    for result in tree_leaves(output.args):
        if not isinstance(result, fx.Node) or not is_tensor(result):
            continue
        shape = value_of(result).shape
        free = [i for i in candidates if i not in found and value_of(inputs[i]).is_floating_point()]
        exact = [i for i in free if _shape(inputs[i]) == tuple(map(str, shape))]
        near = [i for i in free if _differing(inputs[i], shape) == 1]
        if exact or near:
            found.append((exact or near)[0])
    if not found:
        floats = [i for i in candidates if value_of(inputs[i]).is_floating_point()]
        found = floats[:1]
    return found


def _shape(node: fx.Node) -> tuple[str, ...]:
    return tuple(map(str, value_of(node).shape))


def _differing(node: fx.Node, shape: torch.Size) -> int:
    mine = _shape(node)
    if len(mine) != len(shape):
        return -1
    return sum(a != str(b) for a, b in zip(mine, shape, strict=True))


def token_sources(node: fx.Node) -> set[fx.Node]:
    """The graph inputs whose tokens a value holds.

    Follows the data flow backwards; where a slice is taken out of a concatenation, only the operand that fills it.
    """

    def reads(n: fx.Node) -> list[fx.Node]:
        part = _sliced_operand(n)
        return n.all_input_nodes if part is None else [part]

    return {n for n in ancestors(node, reads=reads) if n.op == "placeholder"}


def _sliced_operand(node: fx.Node) -> fx.Node | None:
    """For ``cat([a, b], dim)[..., start:stop, ...]``, also through shape-preserving operations, the operand taken."""
    if node.target is not operator.getitem or not isinstance(node.args[0], fx.Node) or not is_tensor(node):
        return None
    source, item = node.args
    item = item if isinstance(item, tuple) else (item,)
    cuts = [(d, s) for d, s in enumerate(item) if isinstance(s, slice) and (s.start, s.stop) != (None, None)]
    if len(cuts) != 1 or any(not isinstance(s, slice) for s in item) or not isinstance(source, fx.Node):
        return None
    dim, cut = cuts[0]
    while source.target not in (torch.cat, torch.concat):
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
        chosen = operands[0] if cut.start is None else operands[1]
        return chosen if isinstance(chosen, fx.Node) else None
    return None
