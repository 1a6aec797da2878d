"""The wraps of vLLM's engine and worker processes: decisions, records, counters, memory."""
