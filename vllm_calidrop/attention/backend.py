"""The backend vLLM finds under the name CALIDROP (`--attention-backend calidrop`): the one of this platform."""

from __future__ import annotations

from vllm.v1.attention.backend import AttentionBackend

from vllm_calidrop.ops.flavour import uses_cuda_flavour
from vllm_calidrop.scheduler import spec as cache_spec
from vllm_calidrop.support import refuse_platform

refuse_platform()
cache_spec.register()


def _backend() -> type[AttentionBackend]:
    if uses_cuda_flavour():
        from vllm_calidrop.attention.cuda import CaliDropCudaBackend

        return CaliDropCudaBackend
    from vllm_calidrop.attention.cpu import CaliDropCpuBackend

    return CaliDropCpuBackend


CaliDropBackend = _backend()
