"""Accuracy over an OpenAI-compatible endpoint: RULER, needles, LongBench and the small model's own tasks."""
