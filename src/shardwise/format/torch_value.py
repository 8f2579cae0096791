"""One value as ``torch.save`` writes it (DCP does so for everything but tensors), read without running code.

Numbers, text, lists and dictionaries are interpreted as data by `shardwise.format.pickle_tree`. Other values, such as a
tuple with a tensor in it, are left to torch's own unpickler with an allow-list (``weights_only=True``).
"""

from __future__ import annotations

import io
import re
import zipfile

from shardwise.errors import FormatError, UnsafePickleError
from shardwise.format.pickle_tree import PickledCall, PickledGlobal, plain_globals, read_pickle_tree

#: No value beside tensors comes near this; a larger one is damaged or hostile.
MAX_VALUE_BYTES = 2**28

_MAX_PICKLE_BYTES = 2**26
_MAX_DEPTH = 64
_DAMAGED = "The checkpoint is damaged: restore it from a copy."


def read_torch_value(data: bytes, path: str, name: str, *, legacy: bool = False) -> object:
    """The value in ``data``, which ``torch.save`` wrote; ``path`` and ``name`` are for errors.

    ``legacy`` unpickles without restrictions what cannot be read otherwise, which runs code from the file.

    Raises:
        UnsafePickleError: It names something outside the allow-lists, and ``legacy`` is not set.
        FormatError: It is damaged.
    """
    pickled = _pickle_in(data, path, name)
    try:
        return _Plain(path, name).of(read_pickle_tree(pickled, plain_globals(), path), 0)
    except UnsafePickleError:
        return _by_torch(data, path, name, legacy)


def _pickle_in(data: bytes, path: str, name: str) -> bytes:
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            entries = [each for each in archive.infolist() if each.filename.rpartition("/")[2] == "data.pkl"]
            if len(entries) != 1 or entries[0].compress_type != zipfile.ZIP_STORED:
                raise _damaged(path, name, "is not what torch.save writes")
            if entries[0].file_size > min(len(data), _MAX_PICKLE_BYTES):
                raise _damaged(path, name, "claims to be larger than what holds it")
            return archive.read(entries[0])
    except (zipfile.BadZipFile, zipfile.LargeZipFile, ValueError, OSError, NotImplementedError, RuntimeError) as error:
        if isinstance(error, FormatError):
            raise
        raise _damaged(path, name, f"is not what torch.save writes ({error})") from error


def _damaged(path: str, name: str, why: str) -> FormatError:
    return FormatError(f"this value of the checkpoint {why}", path=path, tensor=name, hint=_DAMAGED)


class _Plain:
    """Turns a tree into plain values; what is shared stays shared, so that time is linear in its size."""

    def __init__(self, path: str, name: str) -> None:
        self._path, self._name = path, name
        self._done: dict[int, object] = {}
        self._kept: list[object] = []  # so that no number of `id` is used twice

    def of(self, tree: object, depth: int) -> object:
        if isinstance(tree, (PickledCall, PickledGlobal)):
            return self._torchs(tree)
        if not isinstance(tree, (dict, list, tuple)):
            return tree
        if depth > _MAX_DEPTH:
            raise _damaged(self._path, self._name, "is nested too deeply, or contains itself")
        known = self._done.get(id(tree))
        if known is not None:
            return known
        made: object
        if isinstance(tree, dict):
            made = {self.of(key, depth + 1): self.of(value, depth + 1) for key, value in tree.items()}
        else:
            made = type(tree)([self.of(item, depth + 1) for item in tree])
        self._kept.append(tree)
        self._done[id(tree)] = made
        return made

    def _torchs(self, tree: PickledCall | PickledGlobal) -> object:
        import torch

        if isinstance(tree, PickledGlobal):
            found: object = getattr(torch, tree.name, None) if tree.module == "torch" else None
            if isinstance(found, torch.dtype):
                return found
        elif tree.function.name == "Size" and len(tree.args) == 1 and isinstance(tree.args[0], (list, tuple)):
            sizes = tree.args[0]
            if all(type(size) is int for size in sizes) and tree.state is None:
                return tuple(sizes)
        raise _damaged(self._path, self._name, "has something else where a plain value belongs")


def _by_torch(data: bytes, path: str, name: str, legacy: bool) -> object:
    from pickle import UnpicklingError

    import torch

    try:
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=not legacy)
    except UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        raise UnsafePickleError(
            f"this value is more than numbers, text and tensors: it names {named[1] if named else 'something else'}",
            path=path,
            tensor=name,
            hint="It is not loaded, because unpickling it runs code from the file. If you trust whoever wrote it, set "
            "allow_legacy_pickle_restore, which does that.",
        ) from error
    except Exception as error:
        raise _damaged(path, name, f"cannot be read ({type(error).__name__}: {error})") from error
