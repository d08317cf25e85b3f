"""Calls that hand their arguments over: in a list that the callee empties. Each is freed behind its last reader.

Who calls a function holds its arguments until it returns. A whole model does not notice, whose every tensor is a local
of one function; in pieces, the stream would be kept a second time, and so would what one block makes for the next.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from torch import fx
from torch.fx.graph import CodeGen

Boxed = Callable[[list[Any]], Any]


def taking_a_list(compiled: Callable[..., Any]) -> Boxed | None:
    """What a compiler made, as a function that takes its arguments in a list and empties it; None if it has none.

    AOTAutograd makes one, and hands out a function around it that takes arguments and keeps them.
    """
    function = compiled
    while hasattr(function, "_torchdynamo_orig_callable"):
        function = function._torchdynamo_orig_callable
    if not inspect.isfunction(function):
        return None
    held = inspect.getclosurevars(function).nonlocals
    inner: Boxed | None = held.get("compiled_fn")
    keeps_nothing = held.get("params_buffers_flat") == []
    return inner if keeps_nothing and getattr(inner, "_boxed_call", False) else None


def box(graph: fx.Graph, call: fx.Node, arguments: Sequence[Any]) -> fx.Node:
    """Puts a list of arguments before their call, where they are last read."""
    with graph.inserting_before(call):
        return graph.call_function(list, (tuple(arguments),))


class TakesAList(CodeGen):
    """Code of a graph whose forward takes its inputs in a list, and empties it."""

    def gen_fn_def(self, free_vars: list[str], maybe_return_annotation: str, **_: Any) -> str:
        names = [v.split(":")[0].split("=")[0].strip() for v in free_vars if v != "self"]
        taken = f"\n    {', '.join(names)}, = given" if names else ""
        return f"def {self._func_name}(self, given){maybe_return_annotation}:{taken}\n    given.clear()"
