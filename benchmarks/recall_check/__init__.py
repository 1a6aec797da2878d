"""What recall by pages would do to a model's attention, offline (docs/recall.md)."""
