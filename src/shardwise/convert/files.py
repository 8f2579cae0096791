"""A conversion in the names that a given set of files happens to use.

Files of one model come under several names: with or without the base model's prefix, in the original authors' names or
in transformers' own, with legacy endings, saved unconverted. They are matched by transformers' own code: two names mean
the same tensor if its renamings for loading make one name of both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from shardwise.convert.derive import loading_names
from shardwise.convert.mapping import rename
from shardwise.convert.rules import Computed, Conversion, HubPart, HubTensor, NativeSpec, Rule
from shardwise.stateful_wrappers.wrapping import skeleton


@dataclass(frozen=True, slots=True)
class RenamedRule:
    """A rule whose hub tensors have other names in the files (a `shardwise.convert.rules.Rule`)."""

    rule: Rule  #: The rule under the hub's names.
    in_files: Mapping[str, str]  #: Name in the files of each hub name.

    def forward(self, natives: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """As `shardwise.convert.rules.Rule.forward`."""
        return {self.in_files[name]: tensor for name, tensor in self.rule.forward(natives).items()}

    def backward(self, hub: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """As `shardwise.convert.rules.Rule.backward`."""
        return self.rule.backward({name: hub[file] for name, file in self.in_files.items()})


def for_files(
    model: torch.nn.Module,
    conversion: Conversion,
    natives: Sequence[NativeSpec],
    names: Sequence[str],
    key_mapping: Mapping[str, str] | None = None,
) -> Conversion:
    """Put a conversion into the names of files to load. No collectives; any rank may call.

    A native tensor whose hub tensors are not in the files, while it is there itself, is taken unconverted. One that is
    not there in any form keeps its hub names, so that the loader misses it under the name that the hub would use; names
    of the files that the result does not have are unexpected. The user's ``key_mapping`` (regular expressions and
    replacements, from the files' names to the model's) applies first; it may not make one name of two.
    """
    if not key_mapping and set(conversion.names) <= set(names):
        return conversion
    bare = skeleton(model)
    files = dict(zip(loading_names(bare, rename(names, key_mapping or {})), names, strict=True))
    hub = _in_files(bare, conversion.names, files)
    unconverted = _in_files(bare, [spec.name for spec in natives], files)
    shapes = {spec.name: spec.shape for spec in natives}
    views: list[HubTensor] = []
    taken: set[str] = set()
    for tensor in conversion.hub:
        sources = [part.native for part in tensor.parts]
        if tensor.name not in hub and all(native in unconverted for native in sources):
            fresh = [native for native in dict.fromkeys(sources) if native not in taken]
            views += (HubTensor(unconverted[n], shapes[n], (HubPart(n),)) for n in fresh)
            taken.update(fresh)
        else:
            views.append(tensor._replace(name=hub.get(tensor.name, tensor.name)))
    computed: list[Computed] = []
    for group in conversion.computed:
        members = [spec.name for spec in group.natives]
        if all(s.name not in hub for s in group.hub) and all(native in unconverted for native in members):
            views += (HubTensor(unconverted[n], shapes[n], (HubPart(n),)) for n in members)
        else:
            in_files = {spec.name: hub.get(spec.name, spec.name) for spec in group.hub}
            specs = tuple(spec._replace(name=in_files[spec.name]) for spec in group.hub)
            computed.append(replace(group, hub=specs, rule=RenamedRule(group.rule, in_files)))
    return Conversion(tuple(views), tuple(computed), conversion.ignored)


def _in_files(model: torch.nn.Module, names: Sequence[str], files: Mapping[str, str]) -> dict[str, str]:
    """For each of ``names`` that is in the files, its name there: by what loading makes of both."""
    prefix: str = getattr(model, "base_model_prefix", "") or ""
    out: dict[str, str] = {}
    for name, key in zip(names, loading_names(model, names), strict=True):
        variants = (key, f"{prefix}.{key}", key.removeprefix(f"{prefix}."))
        found = next((files[variant] for variant in variants if variant in files), None)
        if found is not None:
            out[name] = found
    return out
