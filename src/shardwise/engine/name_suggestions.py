"""Lists of names for messages, and the closest name that may have been meant."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Mapping, Sequence

#: Names that a message lists, and how many others one name is compared with at most.
_SHOWN, _MOST_CANDIDATES = 5, 20_000
_CUTOFF = 0.6
#: Similarity of two words that differ by a typing error, and the shortest words that are compared.
_SLIP, _LONG = 0.8, 3
#: Path components that tools add around a parameter's own name.
_WRAPPING = re.compile(r"^(base_layer|base_module|module|default|_orig_mod|parametrizations|original\d*|inner)$")
#: Parameters that older tools gave another name.
_SAME_LEAF = ({"weight", "gamma"}, {"bias", "beta"})
_USUAL_LEAVES = frozenset({"weight", "bias", "gamma", "beta"})

Shapes = Mapping[str, Sequence[int]]


def nearest(name: str, candidates: Collection[str], shapes: Shapes | None = None) -> str | None:
    """The candidate that may be the same tensor under another name, if there is one.

    It is one whose name ends alike: in the same parameter (``weight``) of a module of the same name (``q_proj``), or of
    one that differs by a slip or an abbreviation (``q_project``); never a norm for a projection, ``k_proj`` for
    ``q_proj``, or a bias for a weight. Where shapes, of ``name`` and of candidates, are known, they have to agree.
    """
    module, leaf = _last_two(name)
    known = shapes or {}
    own = known.get(name)
    plausible = []
    for other in candidates:
        other_module, other_leaf = _last_two(other)
        theirs = known.get(other)
        if own is not None and theirs is not None and tuple(own) != tuple(theirs):
            continue
        # One of the two may have slipped, not both.
        unlike = leaf != other_leaf and not _renamed_leaf(leaf, other_leaf) and module != other_module
        if not unlike and _same_leaf(leaf, other_leaf) and _same_module(module, other_module):
            plausible.append(other)
        if len(plausible) == _MOST_CANDIDATES:
            break
    found = difflib.get_close_matches(name, plausible, n=1, cutoff=_CUTOFF)
    return found[0] if found else None


def _last_two(name: str) -> tuple[str, str]:
    """The name of a parameter's module, a number with what it numbers, and the parameter's own."""
    parts = [part for part in name.split(".") if not _WRAPPING.match(part)] or name.split(".")
    leaf, parts = parts[-1], parts[:-1]
    module = parts[-1] if parts else ""
    if module.isdecimal() and len(parts) > 1:
        module = f"{parts[-2]}.{module}"
    return module, leaf


def _renamed_leaf(one: str, other: str) -> bool:
    return any({one, other} <= same for same in _SAME_LEAF)


def _same_leaf(one: str, other: str) -> bool:
    if one == other or _renamed_leaf(one, other):
        return True
    if {one, other} <= _USUAL_LEAVES:
        return False
    # Any other name was chosen freely, or is a typing error.
    return _same_words(one, other) or difflib.SequenceMatcher(None, one, other).ratio() >= _CUTOFF


def _same_module(one: str, other: str) -> bool:
    # For a parameter without a module nothing more is known.
    return one == other or not one or not other or _same_words(one, other)


def _same_words(one: str, other: str) -> bool:
    """Whether two names are of the same words, but for typing errors, abbreviations and how they are joined."""
    first, second = re.split(r"[_.]", one.lower()), re.split(r"[_.]", other.lower())
    if re.findall(r"\d+", one) != re.findall(r"\d+", other):
        return False
    if len(first) != len(second):
        return _slip("".join(first), "".join(second))
    return all(a == b or _slip(a, b) for a, b in zip(first, second, strict=True))


def _slip(one: str, other: str) -> bool:
    if one == other:
        return True
    if min(len(one), len(other)) < _LONG:
        return False
    alike = difflib.SequenceMatcher(None, one, other).ratio()
    return one.startswith(other) or other.startswith(one) or alike >= _SLIP


def listed(
    names: Sequence[str], candidates: Collection[str] = (), owner: str = "", shapes: Shapes | None = None
) -> str:
    """The first few of some names, each with the nearest of ``candidates`` if one is near.

    ``owner`` is the text before the nearest name: "the base has"; ``shapes`` are as for `nearest`.
    """
    shown = []
    for name in names[:_SHOWN]:
        close = nearest(name, candidates, shapes)
        shown.append(name if close is None else f"{name} ({owner} {close})")
    more = len(names) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")
