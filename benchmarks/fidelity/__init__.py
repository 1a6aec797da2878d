"""Teacher-forced fidelity: how far the next-token distribution moves when evicted KV is not all attended."""
