"""Recall by pages: which pages of the evicted KV to read, decided from a 2-bit sketch of its keys (docs/recall.md)."""
