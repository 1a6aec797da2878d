"""The operators of a decode step and of compaction, as sets behind one contract."""
