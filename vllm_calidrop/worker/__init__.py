"""A worker's side of a sequence's life: slots, steps, the state table and compaction."""
