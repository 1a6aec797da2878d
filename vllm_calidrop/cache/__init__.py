"""Where compressed and evicted KV lie, and who decides it."""
