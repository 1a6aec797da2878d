"""Throughput of CaliDrop against vLLM's own backend, side by side: operators, decode steps, compaction, servers."""
