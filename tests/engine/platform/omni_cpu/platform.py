"""The platform."""

import psutil
import torch
from vllm.platforms import cpu
from vllm_omni.platforms.interface import OmniPlatform, OmniPlatformEnum


class CpuPlatform(OmniPlatform, cpu.CpuPlatform):
    _omni_enum = OmniPlatformEnum.OOT
    device_control_env_var = "CUDA_VISIBLE_DEVICES"

    @classmethod
    def get_omni_ar_worker_cls(cls):
        return "vllm_omni.worker.gpu_ar_worker.GPUARWorker"

    @classmethod
    def get_omni_generation_worker_cls(cls):
        return "vllm_omni.worker.gpu_generation_worker.GPUGenerationWorker"

    @classmethod
    def get_default_stage_config_path(cls):
        return "vllm_omni/deploy"

    @classmethod
    def get_diffusion_attn_backend_cls(cls, selected_backend, head_size, allow_trtllm_default=False):
        return "omni_cpu.attention.CpuBackend"

    @classmethod
    def supports_torch_inductor(cls):
        return True

    @classmethod
    def get_torch_device(cls, local_rank=None):
        return torch.device("cpu")

    @classmethod
    def get_device_count(cls):
        return 1

    @classmethod
    def get_device_name(cls, device_id=0):
        return "cpu"

    @classmethod
    def get_device_version(cls):
        return None

    @classmethod
    def is_available(cls):
        return True

    @classmethod
    def get_free_memory(cls, device=None):
        return psutil.virtual_memory().available

    @classmethod
    def get_device_memory(cls, device=None):
        return psutil.virtual_memory().available, psutil.virtual_memory().total

    @classmethod
    def get_device_total_memory(cls, device_id=0):
        return psutil.virtual_memory().total


def _nothing(cls, *args, **kwargs):
    return 0


# A CPU has no queue to wait for, and no memory of its own to count.
for name in ("synchronize", "set_device", "empty_cache", "reset_peak_memory_stats", "max_memory_allocated"):
    setattr(CpuPlatform, name, classmethod(_nothing))
for name in ("max_memory_reserved", "memory_allocated"):
    setattr(CpuPlatform, name, classmethod(_nothing))

# An activation looks this up when it is made, and never calls it on a CPU.
_library = torch.library.Library("_C", "FRAGMENT")
_library.define("silu_and_mul(Tensor! result, Tensor input) -> ()")
