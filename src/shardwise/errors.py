"""Every error that shardwise raises, in one tree.

    ShardwiseError
    |- ConfigError             (ValueError)         a setting is wrong or two settings contradict each other
    |  `- UnknownSettingError  (TypeError)          no setting has this name; names the nearest
    |- MisuseError             (ValueError)         a call that cannot be right, whatever the data
    |  `- AmbiguousFilesError                       several files could be what is meant
    |- StorageError            (OSError)            the file system refused: full, read-only, not writable, lost
    |- CheckpointNotFoundError (FileNotFoundError)  nothing is there to resume from, or a file of it is absent
    |- CheckpointExistsError   (FileExistsError)    a published checkpoint is never overwritten
    |  `- CheckpointBusyError                       another process is saving it at this moment
    |- IncompleteCheckpointError (FileNotFoundError) an interrupted save, named explicitly
    |- FormatError             (ValueError)         bytes that are not what their format promises
    |  |- HeaderError                               a safetensors header
    |  |- WeightIndexError                          a ``*.safetensors.index.json``
    |  |- ManifestError                             a shardwise manifest
    |  |- StateFormatError                          a JSON state file
    |  `- UnsafePickleError                         a pickle that names something outside the allow-list
    |- IntegrityError          (ValueError)         sizes or digests differ from what was written
    |- UnverifiableError       (ValueError)         nobody can say whether what is there is all of it
    |- TensorError             (ValueError)         one tensor cannot be saved or loaded as asked
    |  |- ShapeMismatchError
    |  |- DtypeMismatchError
    |  |- MissingTensorError   (KeyError)           the model wants it, the checkpoint lacks it
    |  |- UnexpectedTensorError (KeyError)          the checkpoint has it, the model lacks it
    |  |- IncompleteTensorError                     the ranks together do not hold all of it
    |  |- ReplicasDifferError                       ranks that hold it as replicas have different values of it
    |  `- NameCollisionError                        two different tensors claim one name
    |- ConversionError         (ValueError)         native names or tensors do not map to the hub's and back
    |- QuantizationError       (ValueError)         a quantization method that is not supported
    |- ExportMismatchError     (ValueError)         what was written differs from what the base model promises
    |- AdapterError            (ValueError)         an adapter that is incomplete or cannot be described
    |- PeerError               (RuntimeError)       another rank died, hung or left
    |- SaveInterruptedError    (RuntimeError)       a background save failed; carries what failed
    `- RemoteError             (RuntimeError)       an error of a type that is not ours, seen on another rank

Each error carries ``path``, ``tensor`` and ``rank`` where they are known, and its text ends with what to do. An error
travels between ranks as a plain record (`ShardwiseError.to_record`), never as a pickle, so every rank raises the same
type with the same text. Below the message Python prints a note: where the documentation explains this type of error.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import ClassVar

#: What a traceback ends with; a note, so that the text itself stays whole where it is quoted in another message.
_MORE = "More: docs/troubleshooting.md#{}"


def _names(message: str, value: str) -> bool:
    """Whether a message has ``value`` in it as a word of its own."""
    return re.search(rf"(?<![\w./]){re.escape(value)}(?![\w/])(?!\.\w)", message) is not None


class ShardwiseError(Exception):
    """Base of every error raised by shardwise.

    Args:
        message: What happened.
        path: The file or directory concerned.
        tensor: Name of the tensor concerned, as it stands in the file.
        rank: Global rank on which it happened.
        hint: What to do about it, one sentence.
    """

    registry: ClassVar[dict[str, type[ShardwiseError]]] = {}

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        ShardwiseError.registry[cls.__name__] = cls

    def __init__(
        self,
        message: str,
        *,
        path: object = None,
        tensor: str | None = None,
        rank: int | None = None,
        hint: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.path = None if path is None else str(path)
        self.tensor = tensor
        self.rank = rank
        self.hint = hint
        self.add_note(_MORE.format(type(self).__name__.lower()))

    def __str__(self) -> str:
        where = [
            f"{label} {value!r}" if label != "rank" else f"rank {value}"
            for label, value in (("tensor", self.tensor), ("path", self.path), ("rank", self.rank))
            if value is not None and (label == "rank" or not _names(self.message, str(value)))
        ]
        text = self.message + (f" [{', '.join(where)}]" if where else "")
        if not self.hint:
            return text
        return f"{text} {self.hint}" if text.endswith(("]", ".", "?", "!", ":")) else f"{text}. {self.hint}"

    def to_record(self) -> dict[str, str | int | None]:
        """Return a JSON-able record from which `from_record` rebuilds an equal error on another rank."""
        return {
            "type": type(self).__name__,
            "message": self.message,
            "path": self.path,
            "tensor": self.tensor,
            "rank": self.rank,
            "hint": self.hint,
            "errno": getattr(self, "errno", None),
        }

    @staticmethod
    def from_record(record: Mapping[str, str | int | None]) -> ShardwiseError:
        """Rebuild the error described by ``record``; an unknown type becomes `RemoteError`."""
        cls = ShardwiseError.registry.get(str(record["type"]), RemoteError)
        tensor, hint = ((None if (text := record.get(key)) is None else str(text)) for key in ("tensor", "hint"))
        rank, code = record.get("rank"), record.get("errno")
        where = None if rank is None else int(rank)
        error = cls(str(record["message"]), path=record.get("path"), tensor=tensor, rank=where, hint=hint)
        if isinstance(error, OSError) and isinstance(code, int):
            error.errno = code
        return error

    @staticmethod
    def wrap(error: BaseException, *, rank: int | None = None) -> ShardwiseError:
        """Return ``error`` as one of ours: unchanged if it is, a `StorageError` for an ``OSError``, else `RemoteError`.

        The rank is filled in where the error does not name one.
        """
        if isinstance(error, ShardwiseError):
            if error.rank is None:
                error.rank = rank
            return error
        if isinstance(error, OSError):
            return StorageError.from_os(error, rank=rank)
        return RemoteError(f"{type(error).__name__}: {error}", rank=rank)


class ConfigError(ShardwiseError, ValueError):
    """A setting is wrong, unknown, or contradicts another."""


class UnknownSettingError(ConfigError, TypeError):
    """No setting has this name. Also a `TypeError`, which Python raises for an unknown keyword."""


class MisuseError(ShardwiseError, ValueError):
    """A call that cannot be right, whatever the data."""


class AmbiguousFilesError(MisuseError):
    """Several files could be what is meant, and none is taken; the message lists them."""


class StorageError(ShardwiseError, OSError):
    """The file system refused an operation. ``errno`` is the operating system's."""

    @classmethod
    def from_os(cls, error: OSError, *, path: object = None, rank: int | None = None) -> StorageError:
        """Describe ``error``, keeping its ``errno`` and adding what to do for the common ones."""
        where = path if path is not None else error.filename
        reason = error.strerror or str(error) or type(error).__name__
        wrapped = cls(reason, path=where, rank=rank, hint=_OS_HINTS.get(error.errno or 0, _ANY_HINT))
        wrapped.errno = error.errno
        return wrapped


_ANY_HINT = "Check the path and the file system that it is on, then try again."
_OS_HINTS = {
    1: "The operation is not permitted; check the owner of the directory.",
    2: "Check that the path exists on every node and that the file system is mounted.",
    5: "The device reports an input/output error; check the disk or the mount and save elsewhere.",
    13: "Check the permissions of the directory.",
    17: "Choose another path or remove what is there.",
    20: "A file stands where a directory is needed; choose another path.",
    21: "A directory stands where a file is needed; choose another path.",
    23: "The machine has too many files open; raise its limit or run fewer processes.",
    24: "The process has too many files open; raise `ulimit -n`, or lower io_threads.",
    27: "The file would exceed what the system allows; raise `ulimit -f`, or lower max_file_bytes.",
    28: "The disk is full: free space or keep fewer checkpoints (max_recent_checkpoints), then save again.",
    30: "The file system is read-only; choose another checkpoint_dir.",
    36: "A name is too long for the file system; choose a shorter path.",
    40: "Links of the path lead in a circle; correct them.",
    107: "The mount has gone; mount the file system again.",
    116: "The network file system has lost the file; check the mount and try again.",
    122: "The quota is used up: free space or keep fewer checkpoints (max_recent_checkpoints), then save again.",
}


class CheckpointNotFoundError(ShardwiseError, FileNotFoundError):
    """There is no checkpoint at the path, or a file that it needs is absent."""


class CheckpointExistsError(ShardwiseError, FileExistsError):
    """A published checkpoint already stands at the path; it is never overwritten."""


class CheckpointBusyError(CheckpointExistsError):
    """Another process, or another checkpointer of this one, is saving this checkpoint at this moment."""


class IncompleteCheckpointError(ShardwiseError, FileNotFoundError):
    """The path holds an interrupted save."""


class FormatError(ShardwiseError, ValueError):
    """Bytes that are not what their format promises."""


class HeaderError(FormatError):
    """A safetensors header is malformed, or contradicts its file."""


class WeightIndexError(FormatError):
    """A weight index is malformed, or names a file or tensor that is absent."""


class ManifestError(FormatError):
    """A manifest is malformed, damaged, or of an unknown version."""


class StateFormatError(FormatError):
    """A JSON state file is malformed, or a value cannot be stored in one."""


class UnsafePickleError(FormatError):
    """A pickle names a class or function outside the allow-list."""


class IntegrityError(ShardwiseError, ValueError):
    """A size or digest differs from the one recorded when the checkpoint was written."""


class UnverifiableError(ShardwiseError, ValueError):
    """Nothing says whether what is there is all of it: no manifest, no metadata and no configuration."""


class TensorError(ShardwiseError, ValueError):
    """One tensor cannot be saved or loaded as asked."""


class ShapeMismatchError(TensorError):
    """Model and checkpoint disagree about a tensor's shape."""


class DtypeMismatchError(TensorError):
    """Model and checkpoint disagree about a tensor's dtype in a way that would lose data."""


class MissingTensorError(TensorError, KeyError):
    """The model has a tensor that the checkpoint lacks."""

    __str__ = ShardwiseError.__str__


class UnexpectedTensorError(TensorError, KeyError):
    """The checkpoint has a tensor that the model lacks."""

    __str__ = ShardwiseError.__str__


class IncompleteTensorError(TensorError):
    """The ranks together do not hold every element of a tensor."""


class ReplicasDifferError(TensorError):
    """Ranks that hold a tensor as replicas have different values of it: saving one would lose the others."""


class NameCollisionError(TensorError):
    """Two different tensors claim the same name."""


class ModuleStateError(ShardwiseError, ValueError):
    """What a module's own methods make for its state, or do with it, cannot be saved or restored."""


class ConversionError(ShardwiseError, ValueError):
    """Native names or tensors do not map to the hub's names and back."""


class QuantizationError(ShardwiseError, ValueError):
    """A quantized base model uses a method that is not supported."""


class ExportMismatchError(ShardwiseError, ValueError):
    """What was written differs from what the base model or the model itself promises."""


class AdapterError(ShardwiseError, ValueError):
    """An adapter is incomplete, or its configuration cannot be described."""


class PeerError(ShardwiseError, RuntimeError):
    """Another rank died, hung or left a collective."""

    def after(self, failure: BaseException) -> PeerError:
        """This error on a rank that had already failed by itself, which its text then says; raise it from ``failure``.

        What is missing on another rank is often no more than a consequence.
        """
        own = str(failure) if isinstance(failure, ShardwiseError) else f"{type(failure).__name__}: {failure}"
        message = f"{self.message}; before that, this rank had failed by itself: {own}"
        return PeerError(message, path=self.path, tensor=self.tensor, rank=self.rank, hint=self.hint)


class SaveInterruptedError(ShardwiseError, RuntimeError):
    """A background save failed."""


class RemoteError(ShardwiseError, RuntimeError):
    """An error of a type that is not ours, as seen on the rank that it names."""


def some(names: Iterable[object], most: int = 3) -> str:
    """The first of several names for a message, and how many more there are."""
    every = [str(name) for name in names]
    return ", ".join(every[:most]) + (f" and {len(every) - most} more" if len(every) > most else "")
