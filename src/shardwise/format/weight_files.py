"""Which files of a directory are its model: the index, else the standard name, else the only one, else an error.

The rule is that of the libraries that write such directories. transformers takes ``model.safetensors`` where it is
there, and ``model.safetensors.index.json`` otherwise; diffusers takes ``diffusion_pytorch_model``'s index first and
then its single file; both take variants (``model.fp16.safetensors``) only if asked to. Where neither of these names is
there, one file, one set of numbered files or one index is what can be meant, and several are refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from shardwise.disk.names import exists
from shardwise.errors import AmbiguousFilesError, CheckpointNotFoundError, WeightIndexError, some
from shardwise.format.index import WeightIndex

_SHOWN = 8
#: Files of sharded tensors: ``shard-00001-model-00001-of-00002``, of which one save has the same total; or plain
#: numbers, ``shard-00001``.
_SHARD = re.compile(r"shard-(?:\d{5,}-(?P<stem>.+)-\d{5,}-of-(?P<total>\d{5,})|[\d-]+)")
#: Files of a set: ``model-00001-of-00002``, ``model.fp16-00001-of-00002``, ``model-00001-of-00002.fp16``.
_NUMBERED = re.compile(r"(?P<stem>.+?)-(?P<number>\d{2,})-of-(?P<total>\d{2,})(?P<variant>\.[\w-]+)?")
#: Files of adapters: peft's, what is trained beside one, and diffusers'.
_ADAPTER_STEMS = ("adapter_model", "adapter", "adapter_extra", "pytorch_lora_weights")


@dataclass(frozen=True, slots=True)
class Naming:
    """How a kind of weight files is named; the first suffix is that of standard names and indices.

    Of transformers' name the single file comes first, then its index; of diffusers' the index, then the single file.
    """

    suffixes: tuple[str, ...]
    stem: str
    diffusion_stem: str = "diffusion_pytorch_model"

    @property
    def standard(self) -> tuple[str, str]:
        """Standard names of single files."""
        return self.stem + self.suffixes[0], self.diffusion_stem + self.suffixes[0]

    def index_stem(self, name: str) -> str | None:
        """The stem of an index, its variant with it, or ``None`` where the name is no index's."""
        found = re.fullmatch(rf"(.+){re.escape(self.suffixes[0])}\.index(\.[\w-]+)?\.json", name)
        return None if found is None else found[1] + (found[2] or "")

    def stem_of(self, name: str) -> str | None:
        """The name of a file of this kind without its suffix."""
        return next((name.removesuffix(s) for s in self.suffixes if name.endswith(s) and name != s), None)


SAFETENSORS = Naming((".safetensors",), "model")
TORCH = Naming((".bin", ".pt", ".pth", ".ckpt"), "pytorch_model")


@dataclass(frozen=True, slots=True)
class WeightFiles:
    """The names of a model's files, sorted, and of the index that lists them.

    ``unread`` is the index that was passed over for the standard file beside it, as transformers does.
    """

    files: tuple[str, ...]
    index: str | None = None
    unread: str | None = None


@dataclass(frozen=True, slots=True)
class _Candidate:
    stem: str
    files: tuple[str, ...]
    label: str
    total: int | None = None


def choose_weights(
    directory: Path, names: Sequence[str], naming: Naming, read: Callable[[Path], WeightIndex]
) -> WeightFiles | None:
    """Choose the files that make up the model in a directory, in which there are ``names``; ``read`` reads an index.

    ``None`` where no file of this kind is there; adapters' files are none.

    Raises:
        AmbiguousFilesError: Several could be meant; all are listed.
        WeightIndexError: The index is malformed, or names a file that is absent.
        CheckpointNotFoundError: Of a set of numbered files without an index some are absent.
    """
    present = sorted(names)
    indices = {stem: name for name in present if (stem := naming.index_stem(name)) is not None}
    candidates = _candidates(present, naming)
    stems = {each.stem for each in candidates} | indices.keys()
    indices = {stem: name for stem, name in indices.items() if not _is_variant(stem, stems)}
    candidates = [each for each in candidates if not _is_variant(each.stem, stems)]
    chosen = _index(directory, candidates, indices, naming)
    if chosen is None:
        return _without_index(directory, candidates, naming)
    index = read(directory / chosen)
    first, _ = naming.standard
    if first in present and chosen == f"{first}.index.json" and index.files and first not in index.files:
        return WeightFiles((first,), None, chosen)
    if not index.files:
        # A model without a tensor has an index that lists nothing, and a file with nothing but its header.
        plain = _without_index(directory, candidates, naming)
        return WeightFiles(() if plain is None else plain.files, chosen)
    return _listed(directory / chosen, index, present)


def files_of_index(index: Path, names: Sequence[str], read: Callable[[Path], WeightIndex]) -> WeightFiles:
    """The files of an index that was given by its path; `WeightIndexError` if it is malformed or one is absent."""
    return _listed(index, read(index), names)


def is_adapter(name: str) -> bool:
    """Whether a file is called as those of adapters are, with its suffix."""
    return name.partition(".")[0] in _ADAPTER_STEMS


def is_index(name: str) -> bool:
    """Whether a file is called as weight indices are."""
    return any(naming.index_stem(name) is not None for naming in (SAFETENSORS, TORCH))


def _listed(path: Path, index: WeightIndex, present: Sequence[str]) -> WeightFiles:
    for name in index.files:
        # A link of a hub cache may lead nowhere.
        if name not in present or not exists(path.parent / name):
            raise WeightIndexError(
                f"the index names {name}, which is absent",
                path=path,
                tensor=next(tensor for tensor, file in index.weight_map.items() if file == name),
                hint="Fetch or restore the missing file; the checkpoint is not whole without it.",
            )
    return WeightFiles(index.files, path.name)


def _index(directory: Path, candidates: Sequence[_Candidate], indices: Mapping[str, str], naming: Naming) -> str | None:
    """The index that decides, or ``None`` where a single file does, or nothing."""
    singles = {each.files[0] for each in candidates if each.total is None and len(each.files) == 1}
    own, diffusion = (stem in indices for stem in (naming.stem, naming.diffusion_stem))
    first, second = (name in singles for name in naming.standard)
    if (own or first) and (diffusion or second):
        raise _ambiguous(directory, candidates, indices.values(), naming)
    if own or diffusion:
        return indices[naming.stem if own else naming.diffusion_stem]
    if first or second or not indices:
        return None
    if len(indices) > 1:
        raise _ambiguous(directory, candidates, indices.values(), naming)
    return next(iter(indices.values()))


def _without_index(directory: Path, candidates: Sequence[_Candidate], naming: Naming) -> WeightFiles | None:
    for name in naming.standard:
        if any(each.files == (name,) for each in candidates):
            return WeightFiles((name,))
    if len(candidates) > 1:
        raise _ambiguous(directory, candidates, (), naming)
    if not candidates:
        return None
    (only,) = candidates
    if only.total is not None and len(only.files) != only.total:
        what = f"of the {only.total} files of {only.label} only {len(only.files)} are there, and no index lists them"
        hint = "Fetch or restore the missing files; the model is not whole without them."
        raise CheckpointNotFoundError(what, path=directory, hint=hint)
    return WeightFiles(only.files)


def _candidates(present: Sequence[str], naming: Naming) -> list[_Candidate]:
    """Single files, and files that belong together, without adapters."""
    groups: dict[tuple[str, int | None], list[str]] = {}
    labels: dict[tuple[str, int | None], str] = {}
    for name in present:
        stem = naming.stem_of(name)
        if stem is None or is_adapter(name):
            continue
        shard, numbered = _SHARD.fullmatch(stem), _NUMBERED.fullmatch(stem)
        if shard is not None:
            label = "shard-*" if shard["stem"] is None else f"shard-*-{shard['stem']}-*-of-{shard['total']}"
            key: tuple[str, int | None] = (label, -1)
            labels[key] = label + naming.suffixes[0]
        elif numbered is not None:
            variant = numbered["variant"] or ""
            key = (numbered["stem"] + variant, int(numbered["total"]))
            labels[key] = f"{numbered['stem']}-*-of-{numbered['total']}{variant}{naming.suffixes[0]}"
        else:
            # Files that differ in their suffixes alone (a.pt, a.bin) are several all the same.
            key = (stem if name == stem + naming.suffixes[0] else name, None)
            labels[key] = name
        groups.setdefault(key, []).append(name)
    return [
        _Candidate(stem, tuple(files), labels[stem, total], None if total == -1 else total)
        for (stem, total), files in groups.items()
    ]


def _is_variant(stem: str, stems: set[str]) -> bool:
    """Whether a name is another version of one beside it: with ``model`` there, ``model.fp16`` is.

    They hold tensors of the same names, so that reading both would take either one's values.
    """
    return any(stem.startswith(f"{other}.") for other in stems - {stem})


def _ambiguous(
    directory: Path, candidates: Sequence[_Candidate], indices: Iterable[str], naming: Naming
) -> AmbiguousFilesError:
    labels = [each.label + ("" if each.total is None else f" ({len(each.files)} files)") for each in candidates]
    listed = some(sorted([*indices, *labels]), _SHOWN)
    first, _ = naming.standard
    return AmbiguousFilesError(
        f"the directory holds several models' files, and no index and no standard name says which is meant: {listed}",
        path=directory,
        hint=f"Pass the path of the file, or of the index, that is meant, or leave one model ({first}) in a directory.",
    )
