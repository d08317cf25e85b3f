"""`export`: a cached model as a ``torch.export`` program."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_unflatten

from fx_cache.compiling import compile_pieces
from fx_cache.config import CacheConfig
from fx_cache.errors import ExportError, OptionError
from fx_cache.exporting.capture import Capture, Constant, Leaf, Result, Weight, capture
from fx_cache.exporting.policy import Counts, decide
from fx_cache.ops import Branch, Handed, Measure
from fx_cache.patterns.graph import is_tensor, value_of
from fx_cache.runtime.policy import UNMEASURED

conditional = torch.ops.higher_order.cond
"""``torch.cond`` of functions that read nothing but their operands: it needs no look of Dynamo's at them."""

State = dict[str, Tensor]

_WITHOUT_MEANING = (
    *("num_inference_steps", "force_refresh_step_hint", "max_sessions", "max_bytes"),
    *("compiler", "dump_dir", "process_groups"),
)
"""Options about requests, which are the caller's here, and about compiling, which comes later."""

_CACHED = "dit_cache"
"""Name of the rewritten graph among the program's modules."""


def export(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None = None,
    config: CacheConfig | None = None,
    **options: Any,
) -> torch.export.ExportedProgram:
    """Exports a model with its cache: the state goes in and comes out, and ``torch.cond`` reuses or computes.

    The program is called as ``outputs, state = program.module()(state, *args, **kwargs)``. A state is what one pass of
    one request remembers: a dict of tensors, at its beginning ``program.example_inputs[0][0]``, which is all zeros, and
    then what the last step returned. Who calls keeps one for each pass of each request; the program takes each call
    for the next step of the pass whose state it is given. Sizes are those of `args`, and options are fixed.

    The state holds ``step``; for each span k ``hits_k``, ``continuous_k`` (int64), ``accumulated_k`` and ``diff_k``
    (float64; the last step's diff, -1.0 if it was not measured), all of no dimensions and on the host; ``probe_k`` and
    what is cached of the span, on the model's device. Inputs that feed a span alone (those of a ControlNet, say) are
    remembered too: a step with other values computes.

    Args:
        model: the module.
        args, kwargs: inputs of its forward, as ``torch.export.export`` takes them; numbers become constants.
        config, options: how it is cached; fields of :class:`fx_cache.CacheConfig`.

    Returns:
        The program, for ``torch.export.save`` or ``torch._inductor.aoti_compile_and_package``.

    Raises:
        ExportError: there is nothing to cache in the model, its ranks decide together, or its output is not made of
            tensors.
        OptionError: an option that has no meaning here, or a value out of range.
        torch._dynamo.exc.Unsupported: the forward cannot be captured as one graph.
    """
    if config is not None and options:
        raise OptionError("export: got a config and options beside it; expected one of them; leave one out.")
    config = config or CacheConfig.checked(options)
    _check(config)
    config = replace(config, hoist_invariants=False)  # nothing outlives a call but the state
    model, kwargs = getattr(model, "_orig_mod", model), dict(kwargs or {})
    with torch.no_grad():
        program = _StatefulForward(model, capture(model, args, kwargs, config), config)
        return torch.export.export(program, (program.empty_state(), *args), kwargs, strict=False)


def _check(config: CacheConfig) -> None:
    defaults = CacheConfig()
    for name in _WITHOUT_MEANING:
        if getattr(config, name) != getattr(defaults, name):
            raise OptionError(
                f"option {name!r}: got {getattr(config, name)!r} for export; expected nothing, since who calls the "
                "program holds the state of requests, and compiles it; leave it out."
            )
    if config.batch_policy == "per_sample":
        raise OptionError(
            "option 'batch_policy': got 'per_sample' for export; expected 'all' or 'any', since one torch.cond decides "
            "a step; choose one of them, or export for one sample."
        )


class _StatefulForward(nn.Module):
    """``(state, *args, **kwargs) -> (outputs, state)``, with the model's parameters under their own names."""

    def __init__(self, model: nn.Module, found: Capture, config: CacheConfig) -> None:
        super().__init__()
        self._modules.update(model._modules)
        self._parameters.update(model._parameters)
        self._buffers.update(model._buffers)
        self._non_persistent_buffers_set |= model._non_persistent_buffers_set
        graph = found.rewritten.gm.graph
        self.add_module(_CACHED, compile_pieces(found.rewritten.gm, lambda piece, examples: piece))
        self._found = found
        self._config = config
        for i, source in enumerate(found.inputs):
            if isinstance(source, Constant):
                self.register_buffer(_constant(i), source.value, persistent=False)
        inputs = list(graph.find_nodes(op="placeholder"))
        output = next(iter(graph.find_nodes(op="output")))
        self._slots = [
            {f"{n.name.removeprefix(f'new_slot_{k}_')}_{k}": value_of(n) for n in slot}
            for k, slot in enumerate(output.args[0][1])
        ]
        self._controls = [
            {f"{inputs[i].name}_{k}": i for i in controls if is_tensor(inputs[i])}
            for k, controls in enumerate(found.rewritten.plan.roles.unseen)
        ]
        self._remembered = {
            name: value_of(inputs[i]) for controls in self._controls for name, i in controls.items()
        } | {name: value for slot in self._slots for name, value in slot.items()}

    def empty_state(self) -> State:
        """What a pass of a request remembers before its first step."""
        state = {"step": torch.zeros((), dtype=torch.int64, device="cpu")}
        for k in range(len(self._slots)):
            state |= {f"{name}_{k}": torch.zeros((), dtype=dtype, device="cpu") for name, dtype in _COUNTS.items()}
        return state | {
            name: torch.zeros(value.shape, dtype=value.dtype, device=value.device)
            for name, value in self._remembered.items()
        }

    def forward(self, state: State, *args: Any, **kwargs: Any) -> tuple[Any, State]:
        leaves = tree_leaves((args, kwargs))
        given = [self._input(i, leaves) for i in range(len(self._found.inputs))]
        gates, slots = [], []
        for k, (slot, controls) in enumerate(zip(self._slots, self._controls, strict=True)):
            changed = [(state[name], given[i]) for name, i in controls.items()]
            counts = Counts(state["step"], *(state[f"{name}_{k}"] for name in _COUNTED))
            gates.append(_TensorGate(self._config, counts, changed))
            slots += [gates[-1], [state[name] for name in slot]]
        results, new_slots = getattr(self, _CACHED)(*given, *slots)
        new_state = {"step": state["step"] + 1}
        for k, (gate, slot, controls) in enumerate(zip(gates, self._slots, self._controls, strict=True)):
            new_state |= {f"{name}_{k}": value for name, value in gate.counted.items()}
            new_state |= dict(zip(slot, new_slots[k], strict=True))
            # Where it is reused they are the same.
            new_state |= {name: given[i].clone() for name, i in controls.items()}
        outputs = [self._output(o, results, leaves) for o in self._found.outputs]
        return tree_unflatten(outputs, self._found.structure), {name: new_state[name] for name in state}

    def _input(self, i: int, leaves: Sequence[Any]) -> Any:
        match self._found.inputs[i]:
            case Leaf(number):
                return leaves[number]
            case Weight(name):
                owner, _, attribute = name.rpartition(".")
                return getattr(self.get_submodule(owner), attribute)
            case Constant():
                return getattr(self, _constant(i))

    def _output(self, source: Leaf | Result | Constant, results: Sequence[Any], leaves: Sequence[Any]) -> Any:
        match source:
            case Leaf(number):
                return leaves[number]
            case Result(number):
                return results[number]
            case Constant(value):
                return value


def _constant(i: int) -> str:
    return f"{_CACHED}_constant_{i}"


_COUNTS = {"hits": torch.int64, "continuous": torch.int64, "accumulated": torch.float64, "diff": torch.float64}
_COUNTED = [f.name for f in fields(Counts) if f.name != "step"]


class _TensorGate:
    """Decides one span with tensors; stands where the runtime has its `SpanGate`.

    Attributes:
        counted: what the state says of the span behind the step.
    """

    def __init__(self, config: CacheConfig, counts: Counts, controls: Sequence[tuple[Tensor, Tensor]]) -> None:
        """
        Args:
            config: how it is decided.
            counts: what the state says of the span.
            controls: of inputs that the probe does not show, what was given at the last step and is given now.
        """
        self._config = config
        self._counts = counts
        self._controls = controls
        self.counted: dict[str, Tensor] = {}

    def __call__(
        self,
        measure: Measure,
        samples: int = 1,
        separable: bool = False,
        ranks: tuple[tuple[str, ...], torch.device] | None = None,
    ) -> _TensorHit:
        if ranks is not None:
            raise ExportError(
                f"export: got a model whose ranks decide together (process groups {', '.join(ranks[0])}); expected one "
                "that runs on one rank; export it without parallelism."
            )

        def diff(settled: Tensor) -> Tensor:
            return conditional(settled, unmeasured, measured, measure.operands)[0]

        def unmeasured(*given: Any) -> tuple[Tensor]:
            return (torch.full((), UNMEASURED, dtype=torch.float64, device="cpu"),)

        def measured(*given: Any) -> tuple[Tensor]:
            of_samples = measure.compute(*given)[0]
            together = of_samples.amin() if self._config.batch_policy == "any" else of_samples.amax()
            return (together.to("cpu", torch.float64),)

        changed = torch.zeros((), dtype=torch.bool, device="cpu")
        if self._controls:
            changed = torch.stack([(before != now).any() for before, now in self._controls]).any().cpu()
        decision = decide(self._config, self._counts, changed, diff)
        counted = decision.counted(self._counts)
        self.counted = {name: getattr(counted, name) for name in _COUNTED} | {"diff": decision.diff}
        return _TensorHit(decision.reuse)


class _TensorHit:
    """A decision that is known only where the program runs."""

    def __init__(self, reuse: Tensor) -> None:
        self._reuse = reuse

    def run(
        self,
        reuse: Branch,
        compute: Handed,
        operands: Sequence[Any],
        slot: Sequence[Tensor],
        by_sample: tuple[bool, ...] | None,
    ) -> Any:
        """Both branches under ``torch.cond``, which hands out nothing that it was given, and both in one layout."""

        def reused(*given: Any) -> tuple[Tensor, ...]:
            return _anew(reuse(*given))

        def computed(*given: Any) -> tuple[Tensor, ...]:
            return _anew(compute(list(given[: len(operands)])))

        return conditional(self._reuse, reused, computed, (*operands, *slot))


def _anew(results: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return tuple([r.clone(memory_format=torch.contiguous_format) for r in results])
