"""Attention on a CPU: torch's own."""

from vllm_omni.diffusion.attention.backends.sdpa import SDPABackend, SDPAImpl


class CpuImpl(SDPAImpl):
    def forward(self, query, key, value, attn_metadata=None):
        return self._forward_impl(query, key, value, attn_metadata)


class CpuBackend(SDPABackend):
    @staticmethod
    def get_impl_cls():
        return CpuImpl
