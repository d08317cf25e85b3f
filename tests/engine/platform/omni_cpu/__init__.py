"""A platform for vLLM-Omni, which has none for a CPU. For tests only."""

import os


def plugin() -> str | None:
    """Where the platform is, if it is asked for."""
    return "omni_cpu.platform.CpuPlatform" if os.environ.get("VLLM_TARGET_DEVICE") == "cpu" else None
