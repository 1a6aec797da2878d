"""The mathematics of CaliDrop and the eviction policies: pure functions of tensors, nothing of vLLM, no device code."""
