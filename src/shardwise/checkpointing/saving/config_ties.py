"""Tensors that a model's configuration ties, compared with those that share memory.

A loader ties what the configuration says, whatever the files hold: transformers keeps two tensors that differ, others
(vLLM) load one and lose the other. Memory and configuration disagree where a tied model is given new memory
(``to_empty``), where head and embedding are separate FSDP units, and where the configuration is changed later.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import cast

from torch import nn

from shardwise.addons.hf_config import untie_configs
from shardwise.checkpointing.exported_part import ExportedPart, exported_modules
from shardwise.checkpointing.loading.ties import file_name
from shardwise.format.manifest import TensorRecord
from shardwise.stateful_wrappers.names import declared_ties, loaders_ties
from shardwise.stateful_wrappers.wrapping import is_pretrained, plain_name, unwrap

_LOG = logging.getLogger(__name__)


def ties_by_config(module: nn.Module) -> dict[str, str]:
    """The ties of a transformers model's present configuration: ``{tied name: the name that it is tied to}``.

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
            # A pipeline stage lacks tensors that its class ties; the ties found when the model was built are used.
            known = None
    if not isinstance(known, dict):
        known = getattr(module, "all_tied_weights_keys", None)
    ties = cast("Mapping[str, str]", known) if isinstance(known, dict) else declared_ties([module])
    return {plain_name(str(name)): plain_name(str(source)) for name, source in ties.items() if source}


def expected_ties(parts: Sequence[ExportedPart]) -> frozenset[str]:
    """Names that a loader of these parts ties to others, so that files may lack them.

    None for a model with a tie in its configuration that is not one in memory: it may have to be exported as untied,
    and then its files have to have every name.
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


def _loose(ties: Mapping[str, str], part: ExportedPart) -> bool:
    places = {name: number for number, (named, _) in enumerate(part.own) for name in (named.name, *named.aliases)}
    return any(name in places and source in places and places[name] != places[source] for name, source in ties.items())


def loose_ties(parts: Sequence[nn.Module], written: Collection[str]) -> dict[str, str]:
    """The configuration's ties with both names in the files: ``{tied name: the name that it is tied to}``.

    ``written`` has the names in the files of all ranks, since pipeline stages may have one name of a tie each. A tie
    with one name in the files is a tie in memory as well.
    """
    found: dict[str, str] = {}
    for module in exported_modules(parts):
        for name, source in ties_by_config(module).items():
            found[file_name(module, name)] = file_name(module, source)
    return {name: source for name, source in found.items() if name in written and source in written}


def settle_ties(ties: Mapping[str, str], tensors: Iterable[TensorRecord], directory: Path) -> bool:
    """Correct a directory's configuration where tensors that it ties were written with different values. Rank 0 calls.

    Two tensors are equal where their digests are; these are of the whole tensors, whichever rank wrote them.

    Returns whether the configuration was changed: it then ties nothing any more.
    """
    differ = differing_ties(ties, tensors)
    if not differ:
        return False
    untie_configs(directory)
    name, source = next(iter(differ.items()))
    _LOG.warning(
        "the configuration ties %s to %s%s, and they have different values: tie_word_embeddings is false in the "
        "export. Call model.tie_weights() after giving the model memory, if they are to be one",
        name,
        source,
        f" and {len(differ) - 1} more" if len(differ) > 1 else "",
    )
    return True


def differing_ties(ties: Mapping[str, str], tensors: Iterable[TensorRecord]) -> dict[str, str]:
    """The ties with two written tensors that have different values."""
    written = {tensor.spec.name: (tensor.crc32c, tensor.spec[1:]) for tensor in tensors} if ties else {}
    return {
        name: source
        for name, source in ties.items()
        if name in written and source in written and written[name] != written[source]
    }
