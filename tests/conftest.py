"""Settings shared by every test."""

from __future__ import annotations

from hypothesis import settings

# No deadline: a slow machine is not a defect.
settings.register_profile("shardwise", deadline=None, print_blob=True)
settings.load_profile("shardwise")
