"""What a model's configuration ties, and what its memory does.

Whoever loads a model by its configuration ties what that says, whatever the files hold: transformers keeps two tensors
that differ, others (vLLM) take one and lose the other. Memory and configuration part where a tied model is given memory
anew (``to_empty``), where head and embedding are units of FSDP of their own, and where somebody changes the
configuration later.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import cast

from torch import nn

from shardwise.checkpointing.inside import Inside
from shardwise.stateful_wrappers.names import declared_ties, loaders_ties, plain_name, unwrap
from shardwise.stateful_wrappers.wrapping import is_pretrained


def ties_by_config(module: nn.Module) -> dict[str, str]:
    """What a transformers model's configuration ties, as it stands now: ``{tied name: the name that it is tied to}``.

    Empty for other modules. Names are the model's own.
    """
    module = unwrap(module)
    if not is_pretrained(module):
        return {}
    expand = getattr(module, "get_expanded_tied_weights_keys", None)
    known: object = None
    if callable(expand):
        try:
            known = expand(all_submodels=True)
        except ValueError:
            # A pipeline stage lacks what its class ties; what was found as the model was built is what there is.
            known = None
    if not isinstance(known, dict):
        known = getattr(module, "all_tied_weights_keys", None)
    ties = cast("Mapping[str, str]", known) if isinstance(known, dict) else declared_ties([module])
    return {plain_name(str(name)): plain_name(str(source)) for name, source in ties.items() if source}


def expected_ties(parts: Sequence[Inside]) -> frozenset[str]:
    """Names whose tensors whoever loads these parts takes from others, so that they need not be in the files.

    None of a model of which the configuration ties something that memory does not: it may have to be exported as
    untied, and then its files have to have every name.
    """
    found: set[str] = set()
    for part in parts:
        if not is_pretrained(unwrap(part.module)):
            found |= loaders_ties([part.module])
            continue
        ties = ties_by_config(part.module)
        if not _loose(ties, part):
            found |= ties.keys()
    return frozenset(found)


def _loose(ties: Mapping[str, str], part: Inside) -> bool:
    places = {name: number for number, (named, _) in enumerate(part.own) for name in (named.name, *named.aliases)}
    return any(name in places and source in places and places[name] != places[source] for name, source in ties.items())


def both_written(ties: Mapping[str, str], written: Iterable[str]) -> dict[str, str]:
    """The ties of which files have both names."""
    names = set(written) if ties else set()
    return {name: source for name, source in ties.items() if name in names and source in names}
