"""Hypothesis without deadlines: the machine may be busy with other things."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("calidrop", deadline=None)
settings.load_profile("calidrop")
