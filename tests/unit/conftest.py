"""Hypothesis without deadlines, as the machine may be busy, and the same examples in every run of the same tests."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("calidrop", deadline=None, derandomize=True)
settings.load_profile("calidrop")
