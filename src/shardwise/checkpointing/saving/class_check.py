"""Checks that the class named in an export's config.json would load the export.

The class is built from that very config.json on the meta device, and its library's own code for loading is run on
tensors without memory: renamings, conversions, the base model's prefix, ties and what the class knows to be missing are
its own. Names and shapes are all that is looked at, so that it is done before a tensor is written.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from shardwise.addons.hf_config import CONFIG, untied
from shardwise.base.class_of_config import build_on_meta, configuration, named_classes, quiet
from shardwise.disk.names import is_file
from shardwise.dtypes import torch_dtype
from shardwise.engine.memo import Memo
from shardwise.engine.name_suggestions import listed
from shardwise.errors import ExportMismatchError
from shardwise.format.json_file import read_json_object
from shardwise.geometry import TensorSpec
from shardwise.plan.roster import Roster
from shardwise.stateful_wrappers.model_parts import config_of, described_part
from shardwise.stateful_wrappers.wrapping import is_pretrained, original_class
from shardwise.upstream.hugging_face import CLASS_NAME, model_mixin
from shardwise.upstream.transformers import (
    config_class,
    left_out,
    load_on_meta,
    registered_classes,
)


@dataclass(frozen=True, slots=True)
class Misfit:
    """Differences between a class and the files of an export, by name; none for a correct export."""

    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    shapes: tuple[str, ...] = ()

    @property
    def count(self) -> int:
        """How many names do not fit."""
        return len(self.missing) + len(self.unexpected) + len(self.shapes)

    def __str__(self) -> str:
        kinds = (("missing", self.missing), ("unexpected", self.unexpected), ("of another shape", self.shapes))
        return "; ".join(f"{kind}: {listed(names)}" for kind, names in kinds if names)


class _CannotCheckError(Exception):
    """Why the check is not possible."""


class ClassCheck:
    """Checks exports, each kind once. Used on rank 0; ``log`` is told why one cannot be checked."""

    def __init__(self, log: Callable[[int, str], None]) -> None:
        self._log = log
        self._sound: dict[bool, Memo[None]] = {False: Memo(), True: Memo()}  # by whether config.json ties nothing

    def check(
        self,
        parts: Sequence[nn.Module],
        directory: Path,
        roster: Roster,
        *,
        passed: Sequence[TensorSpec] = (),
        left_out: Collection[str] = (),
        untie: bool = False,
    ) -> None:
        """Check an export, unless the same was checked before. Rank 0 calls when config.json is written and no tensor.

        ``roster`` has all ranks' tensors under the names that the files are to have, of which ``left_out`` are not
        exported, and ``passed`` further ones, carried over from a base. With ``untie``, config.json is read as one that
        ties nothing.
        """
        model = described_part(parts)
        if model is None or not is_file(directory / CONFIG):
            return
        entries = read_json_object(directory / CONFIG)
        if untie:
            entries = untied(entries)
        if self._sound[untie].holds([roster, type(model)], (entries, passed)):
            return
        specs = [spec for spec in roster.specs if spec.name not in left_out]
        try:
            name, misfit = _look(model, entries, [*specs, *passed])
        except _CannotCheckError as why:
            self._log(logging.INFO, f"the export's names are not checked against a class: {why}")
        else:
            _require_fit(name, misfit, directory / CONFIG)
        self._sound[untie].get([roster, type(model)], (entries, passed), lambda: None)


def check_described(entries: Mapping[str, object], specs: Sequence[TensorSpec], path: Path) -> str | None:
    """Check tensors against the class of transformers' that a configuration names, without a model at hand. Local.

    ``entries`` is the content of config.json at ``path``. Returns why nothing could be checked, ``None`` where the
    class would load them; raises `ExportMismatchError` where it would not.
    """
    classes = [] if CLASS_NAME in entries else named_classes(entries)
    if entries.get("quantization_config") or entries.get("auto_map") or not classes:
        return "config.json names no class of transformers' whose tensors it tells"
    try:
        found = [(cls.__name__, _by_transformers(cls, cast(Any, cls).config_class, entries, specs)) for cls in classes]
    except _CannotCheckError as why:
        return str(why)
    _require_fit(*min(found, key=lambda pair: pair[1].count), path)
    return None


def _require_fit(name: str, misfit: Misfit, path: Path) -> None:
    if misfit.count:
        raise ExportMismatchError(
            f"{name}, which is what the export's config.json describes, would not load it: {misfit}",
            path=path,
            hint="Save the model that has these names (the one inside of a wrapper), adapters with is_peft or merged, "
            "and what the class does not know in a module around it; let the config say what the model is. Nothing is "
            "published. Set verify_export to false (consolidate --no-class-check) if this is what you want.",
        )


def _look(model: nn.Module, entries: Mapping[str, object], specs: Sequence[TensorSpec]) -> tuple[str, Misfit]:
    """The name of the class that is described, and what of the tensors does not fit it."""
    if isinstance(model, model_mixin() or ()):
        cls = original_class(model)
        return cls.__name__, _by_diffusers(cls, entries, specs)
    config = config_of(model)
    known = config_class()
    if known is None or not isinstance(config, known):
        raise _CannotCheckError(
            f"the config of {original_class(model).__name__} is not of a library that builds models"
        )
    if entries.get("quantization_config"):
        raise _CannotCheckError("it is quantized")
    if is_pretrained(model):
        cls = original_class(model)
        return cls.__name__, _by_transformers(cls, type(config), entries, specs)
    named = named_classes(entries)
    classes: Sequence[type] = named or registered_classes(type(config))
    if not classes:
        raise _CannotCheckError(f"transformers has no class for {type(config).__name__}")
    # A model that is no class of transformers' and shows a configuration of its: some class has to open it.
    found = [
        (cls.__name__, _by_transformers(cls, type(config), entries, specs)) for cls in classes[: len(named) or None]
    ]
    return min(found, key=lambda pair: pair[1].count)


def _by_transformers(cls: type, config: type, entries: Mapping[str, object], specs: Sequence[TensorSpec]) -> Misfit:
    """Let transformers load tensors without memory into a model without memory."""
    tensors = {s.name: torch.empty(s.shape, dtype=torch_dtype(s.dtype), device="meta") for s in specs}
    try:
        built = build_on_meta(cls, configuration(config, entries))
        with quiet():
            found = load_on_meta(built, tensors)
    except Exception as error:
        raise _CannotCheckError(f"{cls.__name__} on the meta device: {type(error).__name__}: {error}") from error
    shapes = [f"{name} ({list(ours)}, in the class {list(theirs)})" for name, ours, theirs in found.mismatched]
    # What the class itself leaves out of the files that it writes is not missing from ours.
    missing = found.missing - left_out(built)
    return Misfit(_sorted(missing), _sorted(found.unexpected), _sorted([*shapes, *found.failed]))


def _by_diffusers(cls: type, entries: Mapping[str, object], specs: Sequence[TensorSpec]) -> Misfit:
    try:
        theirs = {name: tuple(value.shape) for name, value in build_on_meta(cls, entries).state_dict().items()}
    except Exception as error:
        raise _CannotCheckError(f"{cls.__name__} on the meta device: {type(error).__name__}: {error}") from error
    ours = {spec.name: spec.shape for spec in specs}
    shapes = [
        f"{name} ({list(ours[name])}, in the class {list(theirs[name])})"
        for name in ours.keys() & theirs.keys()
        if ours[name] != theirs[name]
    ]
    return Misfit(_sorted(theirs.keys() - ours.keys()), _sorted(ours.keys() - theirs.keys()), _sorted(shapes))


def _sorted(names: Iterable[object]) -> tuple[str, ...]:
    return tuple(sorted(map(str, names)))
