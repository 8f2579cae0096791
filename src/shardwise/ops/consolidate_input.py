"""Finds the model at a path given by a user, and checks that each of its tensors is complete."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from shardwise.comm import Group
from shardwise.disk.names import exists, is_directory, is_file, names_in
from shardwise.disk.storage import Storage
from shardwise.engine.verify import extents_of, load_manifest
from shardwise.errors import (
    IncompleteTensorError,
    IntegrityError,
    ManifestError,
    MisuseError,
    StateFormatError,
    UnverifiableError,
)
from shardwise.format.json_file import parse_json
from shardwise.format.manifest import MANIFEST_NAME, Manifest
from shardwise.format.notes import METADATA_DIR
from shardwise.format.strict_json import JsonValue
from shardwise.format.weight_files import is_adapter
from shardwise.geometry import TensorSpec, covers_once
from shardwise.ops.model_class import CONFIG_NAME, ModelClass, model_class
from shardwise.ops.targets import Target, find_targets, with_nested
from shardwise.ops.verify import VerifyReport, verify
from shardwise.plan.reads import SourceTensor
from shardwise.sources.dcp_model import find_model
from shardwise.sources.directory_contents import holds_model
from shardwise.sources.entries import read_entries
from shardwise.sources.others.layout import Layout
from shardwise.sources.others.recognise import recognise
from shardwise.sources.sources import Source, open_source
from shardwise.sources.state_files import read_file
from shardwise.sources.verifying_reader import DigestLedger, RecordedDigest

_ADAPTER_CONFIG = "adapter_config.json"
_OPTIMIZER_STATE = "optimizer.json"
_SHOWN = 3


@dataclass(frozen=True)
class ModelInput:
    """A model to export.

    Attributes:
        directory: Where its files are.
        checkpoint: The checkpoint that contains it, where there is one.
        manifest: Whether a manifest has digests of every byte.
        source: Its tensors under the names of the export, each of their pieces once.
        ledger: Recorded digests of the files.
        notes: Notes for the report, one sentence each.
        kind: The class that the configuration names, where it was looked at.
        native: Whether the names are the model's own, and not yet those of its files.
        side: Where its configuration and tokenizer are, if not in ``directory``.
    """

    directory: Path
    checkpoint: Path
    manifest: bool
    source: Source
    ledger: DigestLedger
    notes: list[str] = field(default_factory=list)
    kind: ModelClass | None = None
    native: bool = False
    side: Path | None = None

    @property
    def beside(self) -> Path:
        """The directory with the configuration and tokenizer."""
        return self.side or self.directory

    def read_json(self, path: Path) -> JsonValue:
        """A JSON file of the input; ``None`` where there is none.

        Raises:
            StateFormatError: It is no JSON.
            IntegrityError: It has changed since the save.
        """
        if not is_file(path):
            return None
        return parse_json(self.read(path), path, StateFormatError)

    def read(self, path: Path) -> bytes:
        """A small file of the input.

        Raises:
            IntegrityError: It has changed since the save.
        """
        content = read_file(path)
        self.ledger.content(path, content)
        return content


def find_input(
    path: Path, storage: Storage, *, prefix: str | None, assume_complete: bool, master_weights: bool = False
) -> ModelInput:
    """Find the model at a path, and check that it is complete.

    Args:
        path: A checkpoint, its ``model`` directory, a root, or another tool's directory.
        storage: Where headers are read from.
        prefix: What the names of the model's tensors begin with in a DCP directory.
        assume_complete: Whether pieces of tensors are believed to be all where nothing says so.
        master_weights: Whether the fp32 master weights of DeepSpeed are taken where 16-bit weights are there too.

    Raises:
        CheckpointNotFoundError: There is nothing at the path.
        IncompleteCheckpointError: It is an interrupted save.
        IntegrityError, ManifestError: It is damaged, as `verify` finds.
        MisuseError: It is no model, or which part is the model is not clear.
        TensorError: A tensor is not whole, or not that of the class that the configuration names.
        UnverifiableError: Nothing says whether the tensors are whole.
    """
    targets = find_targets(path)
    target = _model_target(targets, path)
    directory = target.directory / target.under
    if not target.under and is_directory(directory / "model"):
        directory = directory / "model"
    if not is_directory(directory):
        raise MisuseError("not a directory", path=directory, hint="Name a checkpoint's model directory.")
    report = verify(path, digests=False)
    _refuse_damaged(report, directory)
    _refuse_others(directory)
    manifests = _manifests(target)
    ledger = DigestLedger(_recorded(manifests))
    # Before any header is trusted.
    ledger.headers([place for place in ledger.recorded if place.is_relative_to(directory)], storage)
    found = ModelInput(directory, target.directory, bool(manifests), Source(directory, (), {}), ledger)
    if not manifests:
        found.notes.append("there is no manifest: that the bytes are those that were saved could not be checked")
    dcp = exists(directory / ".metadata")
    other = None if manifests or dcp else recognise(directory, master_weights)
    if master_weights and (other is None or not other.has_masters):
        raise MisuseError("master_weights is for directories of DeepSpeed", path=directory, hint="Leave it out.")
    if dcp:
        return _from_dcp(found, prefix, directory)
    if other is not None:
        found = replace(found, side=None if other.side == directory else other.side)
        if other.dcp is not None:
            return _from_dcp(found, prefix, other.dcp)
    if prefix is not None:
        raise MisuseError("prefix is for DCP directories", path=directory, hint="Leave it out.")
    if other is not None:
        return _from_other(found, other)
    return _from_safetensors(found, [manifest for _, manifest in manifests], assume_complete)


def _model_target(targets: Sequence[Target], path: Path) -> Target:
    models = [target for target in targets if target.directory.name != "optim" or target.under]
    named = [target for target in models if target.under.split("/")[0] != "optim"]
    if not named:
        raise _optimizer(path)
    by_name = [target for target in named if target.directory.name == "model"]
    return by_name[0] if len(named) > 1 and by_name else named[0]


def _optimizer(path: Path) -> MisuseError:
    return MisuseError(
        "this is an optimizer's state and no model", path=path, hint="Name the checkpoint, or its model directory."
    )


def _refuse_damaged(report: VerifyReport, directory: Path) -> None:
    """Raise for what `verify` calls damaged."""
    if not report.damages:
        return
    first = report.damages[0]
    more = f"; {len(report.damages) - 1} more are damaged" if len(report.damages) > 1 else ""
    kind = ManifestError if first.kind == "manifest" else IntegrityError
    elsewhere = not any((report.path / damage.file).is_relative_to(directory) for damage in report.damages)
    raise kind(
        f"the checkpoint is damaged: {first.describe()}{more}",
        path=report.path / first.file,
        tensor=first.tensors[0] if first.tensors else None,
        hint=f"Its model is not: name {directory} to export that alone."
        if elsewhere and kind is IntegrityError
        else "`shardwise verify` lists everything; restore the file from a copy, or take another checkpoint.",
    )


def _refuse_others(directory: Path) -> None:
    """Refuse what is no model, by name."""
    names = names_in(directory)
    configured = any(is_file(place / _ADAPTER_CONFIG) for place in (directory, directory / METADATA_DIR))
    if configured or (any(map(is_adapter, names)) and not holds_model(directory)):
        raise MisuseError(
            "this is an adapter, which is saved in its final form: there is nothing to consolidate",
            path=directory,
            hint="Open it as it is: with PEFT, or a LoRA file of diffusers with load_lora_weights of a pipeline; there "
            "it can be merged into its base model as well (merge_and_unload, fuse_lora).",
        )
    if _OPTIMIZER_STATE in names or (directory.name == "optim" and not is_file(directory / CONFIG_NAME)):
        raise _optimizer(directory)
    if "model_index.json" in names:
        parts = [name for name in names if is_file(directory / name / CONFIG_NAME)]
        raise MisuseError(
            "this is a pipeline of several models",
            path=directory,
            hint=f"Name one of its models' directories: {', '.join(parts) or 'none has a config.json'}.",
        )


def _manifests(target: Target) -> list[tuple[Path, Manifest]]:
    """The target's manifests: its own, and those of exports made later."""
    found = []
    for each in with_nested((target,)):
        manifest = load_manifest(each.directory)
        if manifest is not None:
            found.append((each.directory, manifest))
    return found


def _recorded(manifests: Sequence[tuple[Path, Manifest]]) -> Mapping[Path, Sequence[RecordedDigest]]:
    found: dict[Path, list[RecordedDigest]] = {}
    for directory, manifest in manifests:
        for file, offset, nbytes, crc, tensor in (
            (each.file, each.offset, each.nbytes, each.crc32c, each.tensor)
            for each in extents_of(manifest, manifest.files)
        ):
            found.setdefault(directory / file, []).append(RecordedDigest(offset, nbytes, crc, tensor))
    return found


# --- DCP -------------------------------------------------------------------------------------------------------------


def _from_dcp(found: ModelInput, prefix: str | None, directory: Path) -> ModelInput:
    from shardwise.format.dcp_metadata import DCP_METADATA_NAME, read_dcp_metadata

    if found.manifest:
        found.read(directory / DCP_METADATA_NAME)
    metadata = read_dcp_metadata(directory)
    kind = _class_beside(found.beside)
    expected = () if kind is None else kind.native
    model = find_model(metadata, directory, expected, prefix)
    opened = open_source(directory, Group(None))
    tensors = {name: _once(opened.tensors[dcp], name, directory) for name, dcp in model.names.items()}
    if all(".lora_" in name or ".modules_to_save." in name for name in tensors):
        raise MisuseError(
            "this is an adapter's state, and nothing beside it says what its configuration is",
            path=directory,
            hint="Save the adapter with is_peft, which writes adapter_model.safetensors and adapter_config.json.",
        )
    if kind is not None:
        kind.compare([tensor.spec for tensor in tensors.values()], directory, whole=True)
    if model.left:
        found.notes.append(f"not exported, since it is no tensor: {', '.join(model.left[:_SHOWN])}")
    return _as_named(found, replace(opened, tensors=tensors), kind)


def _as_named(found: ModelInput, source: Source, kind: ModelClass | None) -> ModelInput:
    """The input with tensors under the model's own names."""
    if not any(is_file(place / CONFIG_NAME) for place in (found.beside, found.beside / METADATA_DIR)):
        found.notes.append("there is no config.json: the export is weights alone")
    native = kind is not None and kind.native.keys() <= source.tensors.keys() and kind.native.keys() != kind.hub.keys()
    return replace(found, source=source, kind=kind, native=native)


def _class_beside(directory: Path) -> ModelClass | None:
    for place in (directory / METADATA_DIR, directory):
        kind = model_class(place)
        if kind is not None:
            return kind
    return None


# --- other tools' own layouts ----------------------------------------------------------------------------------------


def _from_other(found: ModelInput, layout: Layout) -> ModelInput:
    """The model of a tool that writes per rank, or in flat partitions."""
    opened = layout.open()
    adapted = next((name for name in opened.source.tensors if ".lora_" in name or ".base_layer." in name), None)
    if adapted is not None:
        raise MisuseError(
            "the model has an adapter's modules in it, under whose names no class of transformers loads it",
            path=layout.directory,
            tensor=adapted,
            hint="Load the state dict into the PeftModel that it is of, and save that with merge_and_unload().",
        )
    kind = _class_beside(found.beside)
    if kind is not None:
        kind.compare([tensor.spec for tensor in opened.source.tensors.values()], layout.directory, whole=True)
    found.notes.extend((*opened.notes, *opened.unchecked))
    return _as_named(found, opened.source, kind)


# --- safetensors -----------------------------------------------------------------------------------------------------


def _from_safetensors(found: ModelInput, manifests: Sequence[Manifest], assume_complete: bool) -> ModelInput:
    directory = found.directory
    source = open_source(directory, Group(None))
    tensors = {name: _once(tensor, name, directory) for name, tensor in source.tensors.items()}
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
        return replace(found, source=replace(source, tensors=tensors))
    kind = _class_beside(directory)
    unknown = _in_pieces(source, tensors)
    if kind is not None:
        kind.compare([tensor.spec for tensor in tensors.values()], directory, whole=bool(unknown))
        unknown = []
    if unknown and not assume_complete:
        raise UnverifiableError(
            f"nothing says how large {len(unknown)} tensors in pieces were, {unknown[0]} among them: whether a file is "
            "absent cannot be told",
            path=directory,
            tensor=unknown[0],
            hint="Put the checkpoint's manifest back, or the model's config.json beside the files; or pass "
            "--assume-complete (assume_complete=True) if you know that every rank's files are here.",
        )
    if unknown:
        found.notes.append(f"{len(unknown)} tensors in pieces were taken to be complete, as was asked for")
    return replace(found, source=replace(source, tensors=tensors), kind=kind)


def _in_pieces(source: Source, tensors: Mapping[str, SourceTensor]) -> list[str]:
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
    return [name for name in parts if name in tensors]


def _once(tensor: SourceTensor, name: str, directory: Path) -> SourceTensor:
    """The tensor under its name in the export, with each of its pieces once.

    Raises:
        IncompleteTensorError: The pieces do not make it up.
    """
    chunks = tuple({chunk.box: chunk for chunk in reversed(tensor.chunks)}.values())[::-1]
    if not covers_once(tensor.spec.shape, [chunk.box for chunk in chunks]):
        raise IncompleteTensorError(
            f"the {len(chunks)} pieces in the files do not make up the tensor of {list(tensor.spec.shape)}",
            path=directory,
            tensor=name,
            hint="A file is absent, or the directory mixes files of different checkpoints.",
        )
    return SourceTensor(TensorSpec(name, tensor.spec.shape, tensor.spec.dtype), chunks)
