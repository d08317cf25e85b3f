"""An inner compiler that counts: the work that a call really does, by torch's own formulas."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_flop

_aten = torch.ops.aten


class _Counter(TorchDispatchMode):
    """Adds up the floating-point operations of all that runs under it."""

    supports_higher_order_operators = True
    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        formula = flop_registry.get(getattr(func, "_overloadpacket", func))
        if func is _aten._scaled_dot_product_flash_attention_for_cpu.default:
            self.total += sdpa_flop(*args[:3], out_val=out)
        elif func is _aten._transformer_encoder_layer_fwd.default:
            matrices = sum(a.numel() for a in args if isinstance(a, Tensor) and a.ndim == 2)
            self.total += 2 * matrices * args[0].shape[:-1].numel()
        elif formula is not None:
            self.total += formula(*args, **kwargs, out_val=out)
        return out


_COUNTER = _Counter()


@torch._dynamo.register_backend
def counting_flops(gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
    """Runs a graph as it is, under the counter."""
    del example_inputs

    def run(*args: Any) -> Any:
        with _COUNTER:
            return gm(*args)

    return run


def flops(call: Callable[[], Any]) -> tuple[Any, int]:
    """What a call returns, and the work of the pieces that it ran."""
    _COUNTER.total = 0
    return call(), _COUNTER.total
