"""The configuration: cache-dit's option names, one frozen dataclass, validated where it is made."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

from fx_cache.errors import OptionError

Scope = Literal["model", "stack"]
BatchPolicy = Literal["all", "any", "per_sample"]
StepsPolicy = Literal["dynamic", "static"]
RefreshPolicy = Literal["once", "repeat"]


@dataclass(frozen=True)
class CacheConfig:
    """How a transformer is cached. Names, meanings and defaults are those of cache-dit's ``DBCacheConfig``.

    Fixed when the graph is compiled:

    Attributes:
        Fn_compute_blocks: blocks at the start of a span's stack(s) that every step runs (the head), >= 1.
        Bn_compute_blocks: blocks at the end that every step runs (the tail), >= 0.
        scope: ``"model"``: one span over adjacent stacks, one decision a step (as FBCache);
            ``"stack"``: a head, span and tail for each stack (as cache-dit).
        hoist_invariants: compute what depends on conditioning and weights alone (text projections, rotary tables, keys
            and values of the text) once a request, and keep it.
        regional: compile like blocks once, each a piece of its own; False: head, span and tail each as one piece, in
            which the compiler may fuse across blocks, in a time that grows with depth.
        process_groups: names of the process groups whose ranks have a part of each sample, and so decide together;
            needed only where the blocks have no collectives that show them.
        compiler: name of the Dynamo backend that compiles the pieces.
        dump_dir: folder for the graphs before and after every pass, the pieces and the report; None: no dump.

    Run-time values, changed by :func:`fx_cache.configure` without a recompile:

    Attributes:
        residual_diff_threshold: a step reuses the span if ``mean|prev - now| / mean|prev|`` of the probe is below it.
            ``<= 0``: never; ``>= 1``: always, without looking.
        max_accumulated_residual_diff_threshold: sum of a request's diffs from which on it computes; None: no limit.
        max_warmup_steps: steps at the start of a request that are computed, counted in steps.
        warmup_interval: within the warm-up, only every n-th step is forced to compute.
        max_cached_steps: reused steps a request may have; -1: no limit.
        max_continuous_cached_steps: reused steps in a row; -1: no limit.
        batch_policy: in a batch, whose samples have a diff each: ``"all"``: a step reuses if every sample may;
            ``"any"``: if one may; ``"per_sample"``: those that may reuse, the others compute.
        num_inference_steps: steps of a request, where known: the step after the last one starts a new request.
        steps_computation_mask: of each step of a request 1 (it computes) or 0; None, and behind its end: the other
            options decide. The warm-up ends with the first run of ones.
        steps_computation_policy: what a 0 means. ``"dynamic"``: the other options decide; ``"static"``: the step reuses
            without looking.
        force_refresh_step_hint: number of the call of a request, counted over all its branches from 0, at which it
            starts afresh; None: nowhere.
        force_refresh_step_policy: ``"once"``: only there; ``"repeat"``: after every so many calls.
        max_sessions: requests that may hold cached tensors at a time; the one used longest ago is dropped for a new
            one, and computes.
        max_bytes: bytes that cached tensors may take up, where they were made; those used longest ago are dropped,
            and computed anew. None: no limit.
    """

    Fn_compute_blocks: int = 8
    Bn_compute_blocks: int = 0
    residual_diff_threshold: float = 0.08
    max_accumulated_residual_diff_threshold: float | None = None
    max_warmup_steps: int = 8
    warmup_interval: int = 1
    max_cached_steps: int = -1
    max_continuous_cached_steps: int = -1
    batch_policy: BatchPolicy = "all"
    num_inference_steps: int | None = None
    steps_computation_mask: tuple[int, ...] | None = None
    steps_computation_policy: StepsPolicy = "dynamic"
    force_refresh_step_hint: int | None = None
    force_refresh_step_policy: RefreshPolicy = "once"
    max_sessions: int = 32
    max_bytes: int | None = None
    scope: Scope = "model"
    hoist_invariants: bool = True
    regional: bool = True
    process_groups: tuple[str, ...] = ()
    compiler: str = "inductor"
    dump_dir: str | None = None

    def __post_init__(self) -> None:
        _check_int(self, "Fn_compute_blocks", 1)
        _check_int(self, "Bn_compute_blocks", 0)
        _check_int(self, "max_warmup_steps", 0)
        _check_int(self, "warmup_interval", 1)
        _check_int(self, "max_cached_steps", -1)
        _check_int(self, "max_continuous_cached_steps", -1)
        for name in ("num_inference_steps", "force_refresh_step_hint"):
            if getattr(self, name) is not None:
                _check_int(self, name, 1)
        if self.steps_computation_mask is not None:
            object.__setattr__(self, "steps_computation_mask", _mask(self.steps_computation_mask))
        _check_int(self, "max_sessions", 1)
        if self.max_bytes is not None:
            _check_int(self, "max_bytes", 0)
        _check_number(self, "residual_diff_threshold")
        if self.max_accumulated_residual_diff_threshold is not None:
            _check_number(self, "max_accumulated_residual_diff_threshold")
        _check_choice(self, "scope", get_args(Scope))
        _check_choice(self, "batch_policy", get_args(BatchPolicy))
        _check_choice(self, "steps_computation_policy", get_args(StepsPolicy))
        _check_choice(self, "force_refresh_step_policy", get_args(RefreshPolicy))
        for name in ("hoist_invariants", "regional"):
            if not isinstance(getattr(self, name), bool):
                raise _invalid(name, getattr(self, name), "True or False")
        if isinstance(self.process_groups, list):
            object.__setattr__(self, "process_groups", tuple(self.process_groups))
        if not isinstance(self.process_groups, tuple) or not all(isinstance(g, str) for g in self.process_groups):
            raise _invalid("process_groups", self.process_groups, "a list of group names (ProcessGroup.group_name)")
        if not isinstance(self.compiler, str) or not self.compiler:
            raise _invalid("compiler", self.compiler, "the name of a torch.compile backend")
        if self.compiler == "dit_cache":
            raise _invalid("compiler", self.compiler, "another torch.compile backend, to compile the pieces with")
        if isinstance(self.dump_dir, Path):
            object.__setattr__(self, "dump_dir", str(self.dump_dir))
        if self.dump_dir is not None and not isinstance(self.dump_dir, str):
            raise _invalid("dump_dir", self.dump_dir, "a path or None")

    @classmethod
    def checked(cls, options: Mapping[str, Any]) -> CacheConfig:
        """A configuration of these options, all of them ours.

        Raises:
            OptionError: an unknown name or a value out of range.
        """
        for name in options:
            if name not in OPTION_NAMES:
                raise _unknown(name)
        return cls(**options)

    def changed(self, changes: Mapping[str, Any]) -> CacheConfig:
        """This configuration with run-time values replaced.

        Raises:
            OptionError: an unknown name, a value out of range, or an option that is fixed at compile time.
        """
        for name in changes:
            if name not in OPTION_NAMES:
                raise _unknown(name)
            if name not in RUNTIME_OPTIONS:
                raise OptionError(
                    f"option {name!r}: got a change after compilation; expected one of the run-time options "
                    f"{', '.join(RUNTIME_OPTIONS)}; compile the model again with options={{{name!r}: ...}} instead."
                )
        return replace(self, **dict(changes))


COMPILE_OPTIONS = (
    *("Fn_compute_blocks", "Bn_compute_blocks", "scope"),
    *("hoist_invariants", "regional", "process_groups", "compiler", "dump_dir"),
)
OPTION_NAMES = tuple(f.name for f in fields(CacheConfig))
RUNTIME_OPTIONS = tuple(n for n in OPTION_NAMES if n not in COMPILE_OPTIONS)


def split_options(options: Mapping[str, Any] | None) -> tuple[CacheConfig, dict[str, Any]]:
    """Our options as a `CacheConfig`, and the rest, which belongs to the inner compiler.

    Raises:
        OptionError: a value out of range, or a name that is nearly one of ours.
    """
    options = dict(options or {})
    ours = {name: options.pop(name) for name in OPTION_NAMES if name in options}
    for name in options:
        if _close(name):
            raise _unknown(name)
    return CacheConfig(**ours), options


def _close(name: str) -> list[str]:
    folded = {n.lower(): n for n in OPTION_NAMES}
    return [folded[m] for m in difflib.get_close_matches(name.lower(), folded, n=1, cutoff=0.8)]


def _unknown(name: str) -> OptionError:
    close = _close(name)
    expected = f"{close[0]!r}" if close else f"one of {', '.join(OPTION_NAMES)}"
    return OptionError(f"option {name!r}: got an unknown name; expected {expected}; correct or remove it.")


def _invalid(name: str, got: object, expected: str) -> OptionError:
    return OptionError(f"option {name!r}: got {got!r}; expected {expected}; correct or remove it.")


def _mask(given: object) -> tuple[int, ...]:
    """A mask of steps: options are compared and hashed, which a list cannot be."""
    steps = tuple(given) if isinstance(given, list | tuple) else ()
    if not steps or any(not isinstance(step, int) or step not in (0, 1) for step in steps):
        raise _invalid("steps_computation_mask", given, "a list of 1 (compute) and 0, one for each step, or None")
    return tuple(map(int, steps))


def _check_int(config: CacheConfig, name: str, least: int) -> None:
    value = getattr(config, name)
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise _invalid(name, value, f"an integer >= {least}")


def _check_choice(config: CacheConfig, name: str, choices: tuple[str, ...]) -> None:
    value = getattr(config, name)
    if value not in choices:
        raise _invalid(name, value, " or ".join(map(repr, choices)))


def _check_number(config: CacheConfig, name: str) -> None:
    value = getattr(config, name)
    if not isinstance(value, int | float) or isinstance(value, bool) or value != value:
        raise _invalid(name, value, "a number")
