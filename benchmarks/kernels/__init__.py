"""What the GPU kernels do and how fast: `python -m benchmarks.kernels` on a GPU, `--toy` without one (docs/gpu.md)."""
