"""Operators of the decode and compaction paths."""
