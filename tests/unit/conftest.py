"""How Hypothesis looks for examples here."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

# A machine that stands still for a moment says nothing about the code.
settings.register_profile("noisy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("noisy")
