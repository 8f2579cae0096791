"""Settings shared by every test."""

from __future__ import annotations

import pytest
from hypothesis import settings

# No deadline: a slow machine is not a defect.
settings.register_profile("shardwise", deadline=None, print_blob=True)
settings.load_profile("shardwise")

#: Folders whose files take longest. They begin first, so that no worker is left with one of them at the end.
_LONGEST = ("tests/faults/", "tests/topology/", "tests/engine/", "tests/hostile/", "tests/addons/")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sort by folder, the longest first."""
    items.sort(key=lambda item: next((n for n, f in enumerate(_LONGEST) if item.nodeid.startswith(f)), len(_LONGEST)))
