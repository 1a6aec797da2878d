"""The backend on CUDA: vLLM's Triton attention, and ours over it. Its tests run it over CPU tensors (docs/gpu.md)."""
