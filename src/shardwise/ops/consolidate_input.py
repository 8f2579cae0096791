"""Finds the model at a path given by a user, and checks that each of its tensors is complete."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

import torch

from shardwise.addons.hf_config import CONFIG
from shardwise.comm import Group
from shardwise.disk.names import exists, is_directory, is_file, is_there, names_in
from shardwise.disk.storage import current
from shardwise.dtypes import torch_dtype
from shardwise.engine.verify import extents_of, load_manifest
from shardwise.errors import (
    IncompleteTensorError,
    IntegrityError,
    ManifestError,
    MisuseError,
    UnsafePickleError,
    UnverifiableError,
    some,
)
from shardwise.format.manifest import MANIFEST_NAME, Manifest
from shardwise.format.notes import DCP_METADATA_NAME, METADATA_DIR
from shardwise.format.sniff import Kind, what_is_file
from shardwise.format.weight_files import TORCH, is_adapter
from shardwise.geometry import TensorSpec, covers_once
from shardwise.ops.model_class import ModelClass, model_class
from shardwise.ops.targets import find_targets, with_nested
from shardwise.ops.torchtitan_names import Renamed, has_own_names, in_transformers_names
from shardwise.ops.verify import VerifyReport, verify
from shardwise.plan.reads import SourceTensor
from shardwise.sources.dcp_model import find_model, places_of, unwrapped_names
from shardwise.sources.directory_contents import holds_model, holds_safetensors, holds_torch_files
from shardwise.sources.entries import read_entries
from shardwise.sources.others.layout import Layout
from shardwise.sources.others.recognise import recognise
from shardwise.sources.reader import DigestLedger, RecordedDigest
from shardwise.sources.sources import Source, open_source
from shardwise.sources.state_files import read_file
from shardwise.sources.tensor_bytes import Computed, ReadBlocks, byte_blocks
from shardwise.sources.torch_files import WRAPPERS, BinSource, entries_of, load_file, open_bin

#: What Lightning's FSDP strategies write beside DCP's files, and an entry of those of ``Trainer.save_checkpoint``.
_LIGHTNING, _LIGHTNING_ENTRY = "meta.pt", "pytorch-lightning_version"
#: Entries of files of ``torch.save``.
_OPTIMIZERS = ("optimizer", "optimizer_state_dict", "optimizer_states", "optim")
_PART = re.compile(r"-\d{5,}-of-\d{5,}\.")
_SHOWN, _MOST_SHOWN, _MOST_LEFT = 3, 5, 12
_NO_MANIFEST = "there is no manifest: that the bytes are those that were saved could not be checked"


@dataclass(frozen=True)
class ModelInput:
    """A model to export.

    Attributes:
        checkpoint: The checkpoint that contains ``directory``, where there is one.
        manifest: Whether a manifest has digests of every byte.
        source: Its tensors under the names of the export, each of their pieces once.
        notes: Notes for the report, one sentence each.
        kind: The class that the configuration names, where it was looked at.
        native: Whether the names are the model's own, and not yet those of its files.
        computed: Tensors whose bytes are not those of a file as they lie there.
        described: Where the configuration and its like are, if not in ``directory``; a file where there are none.
        renamed: What was done to a model under torchtitan's names.
        unnamed_optimizers: Entries of a file that are optimizers' states, whose parameters have no names.
    """

    directory: Path
    checkpoint: Path
    manifest: bool
    source: Source
    ledger: DigestLedger
    notes: list[str] = field(default_factory=list)
    kind: ModelClass | None = None
    native: bool = False
    computed: Mapping[str, Computed] = field(default_factory=dict)
    described: Path | None = None
    unnamed_optimizers: tuple[str, ...] = ()
    renamed: Renamed | None = None

    @property
    def beside(self) -> Path:
        """The directory with the configuration and the tokenizer."""
        return self.described or self.directory

    def read(self, path: Path) -> bytes:
        """A small file of the input; `IntegrityError` where it has changed since the save."""
        content = read_file(path)
        self.ledger.content(path, content)
        return content


@dataclass(frozen=True, slots=True)
class SourceHints:
    """What a caller of `consolidate` or `convert`, which describe it, says of a source that does not say it itself."""

    prefix: str | None = None
    assume_complete: bool = False
    config: Path | None = None
    rope: str | None = None
    master_weights: bool = False


def find_input(path: Path, hints: SourceHints) -> ModelInput:
    """Find the model at a path, and check that it is complete; errors are those of `consolidate`."""
    targets = find_targets(path)
    named = [target for target in targets if (target.under or target.directory.name).split("/")[0] != "optim"]
    if not named:
        raise _optimizer(path)
    target = next((target for target in named if target.directory.name == "model"), named[0])
    directory = target.directory / target.under
    if not target.under and is_directory(directory / "model"):
        directory = directory / "model"
    file = directory if is_file(directory) else None
    if file is not None and (TORCH.stem_of(file.name) is None or is_there(target.directory / MANIFEST_NAME)):
        what = what_is_file(file)
        part = what is None or what.kind in (Kind.SAFETENSORS, Kind.TORCH)
        raise MisuseError(
            f"this is {'a file' if what is None else what.name}, and no directory of a model or checkpoint",
            path=file,
            hint="Name the directory that it is in." if what is None or part else what.hint,
        )
    if hints.config is not None and not is_file(hints.config / CONFIG):
        raise MisuseError(
            f"the directory has no {CONFIG}", path=hints.config, hint="Name the directory of the base model."
        )
    if file is not None and _PART.search(file.name):
        raise MisuseError(
            "this is one of several files of a model", path=file, hint=f"Name their directory: {str(file.parent)!r}."
        )
    refuse_damaged(verify(path, digests=False), directory)
    if file is not None:
        beside = file.parent
        described = hints.config or (beside if is_file(beside / CONFIG) else file)
        source, ledger = Source(file, (), {}), DigestLedger({})
        found = ModelInput(beside, beside, False, source, ledger, [_NO_MANIFEST], described=described)
        return _from_torch(found, file, hints)
    _refuse_others(directory)
    loaded = [(each.directory, load_manifest(each.directory)) for each in with_nested((target,))]
    manifests = [(place, manifest) for place, manifest in loaded if manifest is not None]
    recorded: dict[Path, list[RecordedDigest]] = {}
    for place, manifest in manifests:
        for each in extents_of(manifest, manifest.files):
            digest = RecordedDigest(each.offset, each.nbytes, each.crc32c, each.tensor)
            recorded.setdefault(place / each.file, []).append(digest)
    ledger = DigestLedger(recorded)
    # Before any header is trusted.
    ledger.headers([place for place in ledger.recorded if place.is_relative_to(directory)], current())
    source = Source(directory, (), {})
    notes = [] if manifests else [_NO_MANIFEST]
    found = ModelInput(directory, target.directory, bool(manifests), source, ledger, notes, described=hints.config)
    return _read(found, [manifest for _, manifest in manifests], hints)


def _read(found: ModelInput, manifests: Sequence[Manifest], hints: SourceHints) -> ModelInput:
    """The input with its tensors, whoever wrote them."""
    directory = found.directory
    dcp = exists(directory / ".metadata")
    other = None if manifests or dcp else recognise(directory, hints.master_weights)
    if hints.master_weights and (other is None or not other.has_masters):
        raise MisuseError("master_weights is for directories of DeepSpeed", path=directory, hint="Leave it out.")
    if dcp:
        return _from_dcp(found, directory, hints)
    if other is not None:
        if found.described is None and other.side != directory:
            found = replace(found, described=other.side)
        if other.dcp is not None:
            return _from_dcp(found, other.dcp, hints)
        return _from_other(found, other, hints)
    if not holds_safetensors(directory) and holds_torch_files(directory):
        return _from_torch(found, directory, hints)
    _refuse_prefix(hints, directory)
    return _from_safetensors(found, manifests, hints)


def _refuse_prefix(hints: SourceHints, directory: Path) -> None:
    if hints.prefix is not None:
        raise MisuseError("prefix is for DCP directories and files of torch.save", path=directory, hint="Leave it out.")


def _optimizer(path: Path) -> MisuseError:
    return MisuseError(
        "this is an optimizer's state and no model", path=path, hint="Name the checkpoint, or its model directory."
    )


def refuse_damaged(report: VerifyReport, directory: Path) -> None:
    """Raise for what `verify` calls damaged."""
    if not report.damages:
        return
    first = report.damages[0]
    more = f"; {len(report.damages) - 1} more are damaged" if len(report.damages) > 1 else ""
    kind = ManifestError if first.kind == "manifest" else IntegrityError
    place = report.path if is_directory(report.path) else report.path.parent
    model = directory if is_directory(directory) else place
    elsewhere = not any((place / damage.file).is_relative_to(model) for damage in report.damages)
    raise kind(
        f"the checkpoint is damaged: {first.describe()}{more}",
        path=place / first.file,
        tensor=first.tensors[0] if first.tensors else None,
        hint=f"Its model is not: name {directory} to export that alone."
        if elsewhere and kind is IntegrityError
        else "`shardwise verify` lists everything; restore the file from a copy, or take another checkpoint.",
    )


def _refuse_others(directory: Path) -> None:
    """Refuse what is no model, by name."""
    names = names_in(directory)
    configured = any(is_file(place / "adapter_config.json") for place in (directory, directory / METADATA_DIR))
    if configured or (any(map(is_adapter, names)) and not holds_model(directory)):
        raise MisuseError(
            "this is an adapter, which is saved in its final form: there is nothing to consolidate",
            path=directory,
            hint="Open it as it is: with PEFT, or a LoRA file of diffusers with load_lora_weights of a pipeline. "
            "`shardwise merge-adapter` merges it into its base model (one of diffusers: fuse_lora).",
        )
    if "optimizer.json" in names or (directory.name == "optim" and not is_file(directory / CONFIG)):
        raise _optimizer(directory)
    if "model_index.json" in names:
        parts = [name for name in names if is_file(directory / name / CONFIG)]
        raise MisuseError(
            "this is a pipeline of several models",
            path=directory,
            hint=f"Name one of its models' directories: {', '.join(parts) or 'none has a config.json'}.",
        )


# --- what is read ----------------------------------------------------------------------------------------------------


def class_of(found: ModelInput) -> ModelClass | None:
    """The class that the configuration names: the one that was given, else the one beside the model."""
    for place in (found.beside / METADATA_DIR, found.beside):
        kind = model_class(place)
        if kind is not None:
            return kind
    return None


def _with_class(found: ModelInput, kind: ModelClass | None, rope: str | None, *, whole: bool) -> ModelInput:
    """The input under names of the class, compared with it; ``whole``: with all of its tensors."""
    if kind is not None and has_own_names(found.source.tensors, kind):
        under_names, computed, renamed, note = in_transformers_names(found.source.tensors, found.computed, kind, rope)
        found.notes.append(note)
        source = replace(found.source, tensors=under_names)
        found = replace(found, source=source, computed=computed, renamed=renamed)
    elif rope is not None:
        raise MisuseError(
            "rope is for a Llama under torchtitan's names, with a configuration",
            path=found.directory,
            hint="Leave it out.",
        )
    tensors = found.source.tensors
    if kind is None:
        if has_own_names(tensors, None):
            found.notes.append(
                "the names are torchtitan's, which stay as they are: with the configuration of a Llama (--config) they "
                "become those of transformers"
            )
        return found
    kind.compare([tensor.spec for tensor in tensors.values()], found.directory, whole=whole)
    native = kind.native.keys() <= tensors.keys() and kind.native.keys() != kind.hub.keys()
    return replace(found, kind=kind, native=native)


def _tell_left(found: ModelInput, left: Sequence[str], why: str) -> None:
    if left:
        found.notes.append(f"left out, since {why}: {some(left, _MOST_LEFT)}")


def _tell_missing_config(found: ModelInput) -> None:
    if not any(is_file(place / CONFIG) for place in (found.beside, found.beside / METADATA_DIR)):
        found.notes.append("there is no config.json: the export is weights alone")


def _refuse_adapter(names: Collection[str], path: Path, within: Sequence[str] = (".base_layer.",)) -> None:
    """Refuse the state of an adapter, and that of a model with an adapter's modules, which names ``within`` show."""
    if names and all(".lora_" in name or ".modules_to_save." in name for name in names):
        raise MisuseError(
            "this is an adapter's state, and nothing beside it says what its configuration is",
            path=path,
            hint="Save the adapter with is_peft, which writes adapter_model.safetensors and adapter_config.json.",
        )
    adapted = next((name for name in names if any(sign in name for sign in within)), None)
    if adapted is not None:
        raise MisuseError(
            "the model has an adapter's modules in it, under whose names no class of transformers loads it",
            path=path,
            tensor=adapted,
            hint="Load the state dict into the PeftModel that it is of, and save that with merge_and_unload().",
        )


# --- DCP -------------------------------------------------------------------------------------------------------------


def _from_dcp(found: ModelInput, directory: Path, hints: SourceHints) -> ModelInput:
    from shardwise.format.dcp_metadata import read_dcp_metadata

    if found.manifest:
        found.read(directory / DCP_METADATA_NAME)
    metadata = read_dcp_metadata(directory)
    kind = class_of(found)
    if kind is None and hints.prefix is None and is_file(directory / _LIGHTNING):
        raise _unknown_attribute(directory, "--prefix model where the whole module is the model")
    expected = () if kind is None else kind.native
    model = find_model(metadata, directory, expected, hints.prefix)
    opened = open_source(directory, Group(None))
    tensors = {name: once(opened.tensors[dcp], name, directory) for name, dcp in model.names.items()}
    _refuse_adapter(tensors, directory)
    if model.left:
        found.notes.append(f"not exported, since it is no tensor: {', '.join(model.left[:_SHOWN])}")
    _tell_left(found, model.apart, "it is outside of the model")
    _tell_missing_config(found)
    source = replace(opened, tensors=tensors, below=model.prefix.removesuffix("."))
    return _with_class(replace(found, source=source), kind, hints.rope, whole=True)


# --- torch.save: no code of a pickle runs, what torch's allow-list does not have is refused ------------------------


def _from_torch(found: ModelInput, path: Path, hints: SourceHints) -> ModelInput:
    """The model in a file, or the files of a directory: as it lies there, or below the entry of a training loop."""
    kind = class_of(found)
    try:
        entries = entries_of(path) if is_file(path) else {}
        if entries.keys() >= {"state", "param_groups"}:
            raise MisuseError(
                "this is an optimizer's state and no model", path=path, hint="Name the file that has the model."
            )
        if is_adapter(path.name):
            raise MisuseError(
                "this is an adapter and no model", path=path, hint="Merge it into its base model with PEFT."
            )
        opened = open_bin(path, Group(None))
        if not is_file(path) and len(opened.source.files) == 1:
            entries = entries_of(opened.source.files[0])
    except UnsafePickleError as error:
        error.hint = (
            "No option of this command runs code of a file. If you trust whoever wrote it, open it in Python with "
            "torch.load(PATH, weights_only=False), and save the model's state dict alone."
        )
        raise
    saved = {**opened.source.tensors} | {name: SourceTensor(spec, ()) for name, (spec, _) in opened.loose.items()}
    names = _names(saved, kind, hints.prefix, path, _LIGHTNING_ENTRY in entries)
    tensors = {new: saved[name]._replace(spec=saved[name].spec._replace(name=new)) for new, name in names.items()}
    _refuse_adapter(tensors, path)
    if found.described is None and not is_file(path / CONFIG):
        found = replace(found, described=opened.source.files[0])  # whatever else lies there is not the model's
    taken = set(names.values())
    beside = [name for name, is_filled in entries.items() if is_filled and name not in WRAPPERS]
    _tell_left(found, [*(name for name in saved if name not in taken), *beside], "it is not the model's")
    _tell_missing_config(found)
    computed = _loose(opened)
    found = replace(
        found,
        source=replace(opened.source, tensors=tensors),
        computed={new: computed[name] for new, name in names.items() if name in computed},
        unnamed_optimizers=tuple(name for name in beside if name in _OPTIMIZERS),
    )
    return _with_class(found, kind, hints.rope, whole=True)


def _loose(opened: BinSource) -> dict[str, Computed]:
    """What torch has to load: tensors of files from before torch 1.6, and those that do not lie in row-major order."""

    @cache
    def state(file: Path) -> Mapping[str, torch.Tensor]:
        return load_file(file, legacy=False)

    def one(name: str, file: Path, dtype: str) -> Computed:
        def blocks(read: ReadBlocks) -> Iterator[memoryview]:
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
        places = list(dict.fromkeys(place for own in (kind.native, kind.hub) for place in places_of([*tensors], own)))
        if len(places) > 1 and "" not in places:
            raise MisuseError(
                f"which tensors are the model's is not clear: a {kind.name} fits what is below each of "
                f"{', '.join(places)}",
                path=path,
                hint="Say what the names of the model's tensors begin with: --prefix model (prefix='model').",
            )
        # Where the class's names are not there, that is found later.
        place = "" if "" in places or not places else places[0]
    elif is_lightning:
        raise _unknown_attribute(
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


def _unknown_attribute(path: Path, whole: str) -> MisuseError:
    """The error for a LightningModule; ``whole`` says what to do where all of it is the model."""
    return MisuseError(
        "this is a checkpoint of Lightning, where the model is an attribute of a LightningModule; which one is not "
        "known",
        path=path,
        hint="Name the directory with the model's config.json (--config), or what the names of its tensors begin with: "
        f"--prefix model.model (prefix='model.model'), or {whole}.",
    )


def _tops(tensors: Mapping[str, SourceTensor]) -> str:
    return some(dict.fromkeys(repr(name.split(".")[0]) for name in tensors), _MOST_SHOWN)


# --- other tools' own layouts ----------------------------------------------------------------------------------------


def _from_other(found: ModelInput, layout: Layout, hints: SourceHints) -> ModelInput:
    """The model of a tool that writes per rank, or in flat partitions."""
    _refuse_prefix(hints, layout.directory)
    opened = layout.open()
    _refuse_adapter(opened.source.tensors, layout.directory, (".base_layer.", ".lora_"))
    found.notes.extend((*opened.notes, *opened.unchecked))
    _tell_missing_config(found)
    return _with_class(replace(found, source=opened.source), class_of(found), hints.rope, whole=True)


# --- safetensors -----------------------------------------------------------------------------------------------------


def _from_safetensors(found: ModelInput, manifests: Sequence[Manifest], hints: SourceHints) -> ModelInput:
    directory = found.directory
    source = open_source(directory, Group(None))
    tensors = {name: once(tensor, name, directory) for name, tensor in source.tensors.items()}
    found = replace(found, source=replace(source, tensors=tensors))
    if manifests:
        # Each file that was written is there, so all pieces are; a tensor's record has to agree.
        recorded = {t.spec.name: t.spec.shape for m in manifests for t in m.tensors if t.component == "model"}
        for name, tensor in tensors.items():
            if name in recorded and recorded[name] != tensor.spec.shape:
                raise IntegrityError(
                    f"the files make up a tensor of {list(tensor.spec.shape)}, the manifest has {list(recorded[name])}",
                    path=directory / MANIFEST_NAME,
                    tensor=name,
                    hint="The directory mixes files of different checkpoints; restore it from a copy.",
                )
        if found.described is None and hints.rope is None:
            return found
        return _with_class(found, class_of(found), hints.rope, whole=True)
    kind = class_of(found)
    unknown = _in_pieces(source)
    if kind is not None:
        return _with_class(found, kind, hints.rope, whole=bool(unknown))
    if unknown and not hints.assume_complete:
        raise UnverifiableError(
            f"nothing says how large {len(unknown)} tensors in pieces were, {unknown[0]} among them: whether a file is "
            "absent cannot be told",
            path=directory,
            tensor=unknown[0],
            hint="Put the checkpoint's manifest back, or name the directory of the model's config.json with --config "
            "(config=DIR); or pass --assume-complete (assume_complete=True) if you know that every rank's files are "
            "here.",
        )
    if unknown:
        found.notes.append(f"{len(unknown)} tensors in pieces were taken to be complete, as was asked for")
    return _with_class(found, None, hints.rope, whole=False)


def _in_pieces(source: Source) -> list[str]:
    """Tensors that files say to be parts of, without an index that says that one file has all of it."""
    indexed = {
        path.parent
        for path in source.files
        if any(name.endswith(".safetensors.index.json") for name in names_in(path.parent))
    }
    parts: dict[str, None] = {}
    for file in source.files:
        if file.parent not in indexed:
            parts |= {entry.name: None for entry in read_entries(file) if entry.saved is not None}
    return [name for name in parts if name in source.tensors]


def once(tensor: SourceTensor, name: str, directory: Path) -> SourceTensor:
    """The tensor under its name in the export, with each of its pieces once; they have to make it up."""
    chunks = tuple({chunk.box: chunk for chunk in reversed(tensor.chunks)}.values())[::-1]
    if not covers_once(tensor.spec.shape, [chunk.box for chunk in chunks]):
        raise IncompleteTensorError(
            f"the {len(chunks)} pieces in the files do not make up the tensor of {list(tensor.spec.shape)}",
            path=directory,
            tensor=name,
            hint="A file is absent, or the directory mixes files of different checkpoints.",
        )
    return SourceTensor(TensorSpec(name, tensor.spec.shape, tensor.spec.dtype), chunks)
