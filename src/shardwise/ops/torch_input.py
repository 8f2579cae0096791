"""The model in files of ``torch.save``: as they lie, or below the entry of a training loop.

No code of a pickle runs: what torch's allow-list does not have is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch

from shardwise.comm import Group
from shardwise.disk.names import is_file
from shardwise.dtypes import torch_dtype
from shardwise.errors import MisuseError, UnsafePickleError, some
from shardwise.format.weight_files import is_adapter
from shardwise.ops.computed_tensors import BlockReader, Computed
from shardwise.ops.model_class import ModelClass
from shardwise.plan.reads import SourceTensor
from shardwise.sources.dcp_model import places_of, unwrapped_names
from shardwise.sources.sources import Source
from shardwise.sources.tensor_bytes import byte_blocks
from shardwise.sources.torch_files import WRAPPERS, BinSource, entries_of, load_file, open_bin

#: An entry of the files that Lightning's ``Trainer.save_checkpoint`` writes.
_LIGHTNING = "pytorch-lightning_version"
_OPTIMIZER = ("state", "param_groups")
_OPTIMIZERS = ("optimizer", "optimizer_state_dict", "optimizer_states", "optim")
_PART = re.compile(r"-\d{5,}-of-\d{5,}\.")
_SHOWN = 5


@dataclass(frozen=True, slots=True)
class TorchModel:
    """A model in such files.

    Attributes:
        computed: Tensors that byte ranges of the files do not give.
        left: Names of tensors and entries of the file beside it.
        optimizers: Those of them that are optimizers' states.
    """

    source: Source
    computed: Mapping[str, Computed]
    left: tuple[str, ...]
    optimizers: tuple[str, ...]


def open_torch_model(path: Path, kind: ModelClass | None, prefix: str | None) -> TorchModel:
    """Open a file, or the files of a directory; ``kind`` and ``prefix`` say which tensors are the model, if given."""
    try:
        entries = entries_of(path) if is_file(path) else {}
        _refuse_others(path, entries)
        opened = open_bin(path, Group(None))
        if not is_file(path) and len(opened.source.files) == 1:
            entries = entries_of(opened.source.files[0])
    except UnsafePickleError as error:
        error.hint = (
            "No option of this command runs code of a file. If you trust whoever wrote it, open it in Python with "
            "torch.load(PATH, weights_only=False), and save the model's state dict alone."
        )
        raise
    tensors = {**opened.source.tensors} | {name: SourceTensor(spec, ()) for name, (spec, _) in opened.loose.items()}
    names = _names(tensors, kind, prefix, path, _LIGHTNING in entries)
    computed = _loose(opened)
    chosen = {new: tensors[name]._replace(spec=tensors[name].spec._replace(name=new)) for new, name in names.items()}
    made = {new: computed[name] for new, name in names.items() if name in computed}
    taken = set(names.values())
    beside = [name for name, is_filled in entries.items() if is_filled and name not in WRAPPERS]
    left = [*(name for name in tensors if name not in taken), *beside]
    found = tuple(name for name in beside if name in _OPTIMIZERS)
    return TorchModel(replace(opened.source, tensors=chosen), made, tuple(left), found)


def refuse_part(path: Path) -> None:
    """Raise `MisuseError` for a file that is called as one of several of a model."""
    if _PART.search(path.name):
        raise MisuseError(
            "this is one of several files of a model", path=path, hint=f"Name their directory: {str(path.parent)!r}."
        )


def _refuse_others(path: Path, entries: Mapping[str, bool]) -> None:
    """Refuse a file that holds something else than a model, by name."""
    if entries.keys() >= set(_OPTIMIZER):
        raise MisuseError(
            "this is an optimizer's state and no model", path=path, hint="Name the file that has the model."
        )
    if is_adapter(path.name):
        raise MisuseError("this is an adapter and no model", path=path, hint="Merge it into its base model with PEFT.")


def _loose(opened: BinSource) -> dict[str, Computed]:
    """What torch has to load: tensors of files from before torch 1.6, and those that do not lie in row-major order."""

    @cache
    def state(file: Path) -> Mapping[str, torch.Tensor]:
        return load_file(file, legacy=False)

    def one(name: str, file: Path, dtype: str) -> Computed:
        def blocks(reader: BlockReader) -> Iterator[memoryview]:
            return byte_blocks(state(file)[name], torch_dtype(dtype))

        return blocks

    return {name: one(name, file, spec.dtype) for name, (spec, file) in opened.loose.items()}


def _names(
    tensors: Mapping[str, SourceTensor], kind: ModelClass | None, prefix: str | None, path: Path, is_lightning: bool
) -> dict[str, str]:
    """The model's name of each of its tensors -> the file's."""
    if prefix is not None:
        place = prefix.rstrip(".")
    elif kind is not None:
        place = _place(tensors, kind, path)
    elif is_lightning:
        raise unknown_attribute(
            path, f"--prefix '' where all tensors are the model's; they begin with {_tops(tensors)}"
        )
    else:
        place = ""
    front = f"{place}." if place else ""
    found = {name.removeprefix(front): name for name in tensors if name.startswith(front)}
    if not found:
        raise MisuseError(
            f"no tensor's name begins with {front!r}; they begin with {_tops(tensors)}",
            path=path,
            hint="Say what the names of the model's tensors begin with.",
        )
    return unwrapped_names(found, path)


def unknown_attribute(path: Path, whole: str) -> MisuseError:
    """The error for a LightningModule; ``whole`` says what to do where all of it is the model."""
    return MisuseError(
        "this is a checkpoint of Lightning, where the model is an attribute of a LightningModule; which one is not "
        "known",
        path=path,
        hint="Name the directory with the model's config.json (--config), or what the names of its tensors begin with: "
        f"--prefix model.model (prefix='model.model'), or {whole}.",
    )


def _place(tensors: Mapping[str, SourceTensor], kind: ModelClass, path: Path) -> str:
    """The one place below which all names of the class are; where its names are not there, that is found later."""
    places = list(dict.fromkeys(place for own in (kind.native, kind.hub) for place in places_of([*tensors], own)))
    if len(places) > 1 and "" not in places:
        raise MisuseError(
            f"which tensors are the model's is not clear: a {kind.name} fits what is below each of {', '.join(places)}",
            path=path,
            hint="Say what the names of the model's tensors begin with: --prefix model (prefix='model').",
        )
    return "" if "" in places or not places else places[0]


def _tops(tensors: Mapping[str, SourceTensor]) -> str:
    return some(dict.fromkeys(repr(name.split(".")[0]) for name in tensors), _SHOWN)
