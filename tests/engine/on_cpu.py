"""What the engine does otherwise on a CPU, changed in this process."""

from __future__ import annotations

from vllm.model_executor.custom_op import CustomOp
from vllm.model_executor.layers import utils


def as_on_a_gpu() -> None:
    """Single operations run uncompiled (Inductor rounds otherwise), and none needs kernels that are not built here."""
    CustomOp.maybe_compile = lambda self, forward, **options: forward
    utils.check_cpu_sgl_kernel = lambda *sizes: False  # for AMX
