"""Lists of names for messages, and which other name somebody may have meant."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Sequence

#: Names that a message lists, and how many others one name is compared with at most.
_SHOWN, _MOST_CANDIDATES = 5, 20_000


def nearest(name: str, candidates: Collection[str]) -> str | None:
    """The candidate that looks most like ``name``, if any does."""
    # Whatever is near ends alike, in most models; looking at those first keeps a long list from taking seconds.
    leaf = name.rpartition(".")[2]
    alike = [other for other in candidates if other.rpartition(".")[2] == leaf] or list(candidates)
    found = difflib.get_close_matches(name, alike[:_MOST_CANDIDATES], n=1, cutoff=0.6)
    return found[0] if found else None


def listed(names: Sequence[str], candidates: Collection[str] = (), whose: str = "") -> str:
    """The first few of some names, each with the nearest of ``candidates`` if one is near.

    Args:
        names: What is listed; how many more there are is said.
        candidates: Other names.
        whose: What stands before the nearest one: "the base has".
    """
    shown = []
    for name in names[:_SHOWN]:
        close = nearest(name, candidates)
        shown.append(name if close is None else f"{name} ({whose} {close})")
    more = len(names) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")
