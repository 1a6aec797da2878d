"""The attention backend: metadata, implementation, compaction, and the operators they use."""
