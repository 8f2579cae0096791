"""Entries of a DCP directory beside sharded tensors: values that DCP pickled, and small tensors read whole."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, cast

from shardwise.disk.guarded import open_regular, read_exactly
from shardwise.disk.names import is_file
from shardwise.disk.storage import located
from shardwise.errors import CheckpointNotFoundError, FormatError, MisuseError, StorageError
from shardwise.format.dcp_metadata import read_dcp_metadata
from shardwise.format.notes import DCP_METADATA_NAME
from shardwise.format.torch_archive import MAX_VALUE_BYTES, read_torch_value
from shardwise.sources.dcp_model import DcpPath, item_paths, refuse_transformed, tensor_names

if TYPE_CHECKING:
    import torch
    from torch.distributed.checkpoint.metadata import Metadata

    from shardwise.upstream.torch_checkpoint import StorageInfo

#: Tensors that are no part of a model or of an optimizer's state are small: counters, a tensor learning rate.
MAX_SMALL_TENSOR_BYTES = 2**28


def is_dcp(directory: Path) -> bool:
    """Whether a directory is one that DCP wrote."""
    return is_file(directory / DCP_METADATA_NAME)


class DcpValues:
    """Reads single items of a DCP directory. Local; nothing is read before it is asked for.

    With ``legacy`` what cannot be read otherwise is unpickled without restrictions, which runs code from the files.
    """

    def __init__(self, directory: Path, legacy: bool = False) -> None:
        self.directory = directory
        self.metadata: Metadata = read_dcp_metadata(directory / DCP_METADATA_NAME)
        self.paths: Mapping[str, DcpPath] = item_paths(self.metadata)
        self.tensors = frozenset(tensor_names(self.metadata))
        self._legacy = legacy
        self._places: dict[str, list[tuple[tuple[int, ...], StorageInfo]]] = {}
        for index, info in (self.metadata.storage_data or {}).items():
            self._places.setdefault(index.fqn, []).append((tuple(index.offset or ()), info))
        self._read: dict[bytes, object] = {}

    def values(self, names: Iterable[str]) -> dict[str, object]:
        """Several items, in the order in which they lie in the files."""
        order = sorted(names, key=lambda name: [(info.relative_path, info.offset) for _, info in self._at(name)])
        found = {name: self.value(name) for name in order}
        return {name: found[name] for name in names}

    def value(self, name: str) -> object:
        """One item: a value, or a small tensor, whole.

        Raises:
            CheckpointNotFoundError, FormatError: A file is absent or damaged, or the item too large for such a value.
            UnsafePickleError: It names something outside the allow-lists.
        """
        if name in self.tensors:
            return self._tensor(name)
        places = self._at(name)
        if len(places) != 1:
            raise FormatError(
                f"the metadata name {len(places)} places for this value", path=self.directory, tensor=name
            )
        raw, path = self._bytes(places[0][1], name)
        # Thousands of parameters have the same few options.
        if raw not in self._read:
            self._read[raw] = read_torch_value(raw, str(path), name, legacy=self._legacy)
        return self._read[raw]

    def _at(self, name: str) -> list[tuple[tuple[int, ...], StorageInfo]]:
        return self._places.get(name, [])

    def _bytes(self, info: StorageInfo, name: str) -> tuple[bytes, Path]:
        path = self.directory / info.relative_path
        refuse_transformed(info, path, name)
        if info.length > MAX_VALUE_BYTES:
            raise FormatError(
                f"has {info.length} bytes, too many for what is no sharded tensor", path=path, tensor=name
            )
        try:
            with open_regular(path, FormatError) as (file, _):
                file.seek(info.offset)
                raw = read_exactly(file, info.length)
        except FileNotFoundError as error:
            raise CheckpointNotFoundError(
                f"the metadata names {info.relative_path}, which is absent",
                path=path,
                tensor=name,
                hint="Restore the missing file; the checkpoint is not whole without it.",
            ) from error
        except OSError as error:
            raise StorageError.from_os(error, path=path) from error
        if len(raw) != info.length:
            raise FormatError("the file ends within this item", path=path, tensor=name, hint="Restore the file.")
        return raw, path

    def _tensor(self, name: str) -> torch.Tensor:
        import torch
        from torch.distributed.checkpoint.metadata import TensorStorageMetadata

        from shardwise.sources.packed_items import load_item

        item = self.metadata.state_dict_metadata[name]
        assert isinstance(item, TensorStorageMetadata)
        whole = torch.empty(0, dtype=item.properties.dtype)
        if item.size.numel() * whole.element_size() > MAX_SMALL_TENSOR_BYTES:
            raise MisuseError(
                f"a tensor of {list(item.size)} is too large for what is read whole on every rank",
                path=self.directory,
                tensor=name,
                hint="Load it by DCP's own means, with shardwise.SafetensorsReader for a reader.",
            )
        whole = torch.zeros(item.size, dtype=item.properties.dtype)
        places = dict(self._at(name))
        for chunk in item.chunks:
            info = places.get(tuple(chunk.offsets))
            if info is None:
                raise FormatError("the metadata lists a chunk without its place", path=self.directory, tensor=name)
            raw, path = self._bytes(info, name)
            try:
                part = load_item(raw, tuple(chunk.sizes), whole.dtype)
            except FormatError as error:
                raise located(error, path, name) from None
            where = tuple(slice(o, o + n) for o, n in zip(chunk.offsets, chunk.sizes, strict=True))
            whole[where] = part
        return whole


def nested(found: Mapping[DcpPath, object]) -> object:
    """The value that DCP flattened: path -> part. Dictionaries of consecutive numbers are lists."""
    root: dict[str | int, object] = {}
    for path, value in found.items():
        if not path:
            return value
        at = root
        for part in path[:-1]:
            inner = at.setdefault(part, {})
            if not isinstance(inner, dict):
                raise FormatError(f"the metadata have {'.'.join(map(str, path))} below a value")
            at = cast("dict[str | int, object]", inner)
        at[path[-1]] = value
    return _with_lists(root)


def _with_lists(value: object) -> object:
    if not isinstance(value, dict):
        return value
    made = {key: _with_lists(each) for key, each in value.items()}
    if made and all(type(key) is int for key in made) and sorted(made) == list(range(len(made))):
        return [made[number] for number in range(len(made))]
    return made
