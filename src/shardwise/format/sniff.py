"""The format of a file by its first bytes, for messages: which format was found, and how to open such a file.

Nothing is parsed and nothing trusted: a format is named where its signature is found, and no decision about values
follows from it. Signatures are those of the formats' own specifications.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from enum import StrEnum

from shardwise.disk.guarded import open_regular, read_exactly
from shardwise.errors import FormatError, ShardwiseError

#: How many of a file's first bytes are read: a tar archive's signature ends at byte 265.
FIRST_BYTES = 512

_LONGEST_HEADER = 100_000_000


class Kind(StrEnum):
    """Families of formats, as far as callers distinguish them."""

    SAFETENSORS = "safetensors"
    #: A zip archive, a tar archive or a bare pickle of ``torch.save``.
    TORCH = "torch"
    GGUF = "gguf"
    #: A pointer to a file that was not fetched.
    POINTER = "pointer"
    #: A page or a text that a server sent in the file's place.
    TEXT = "text"
    #: Weights of another framework.
    FOREIGN = "foreign"
    ARCHIVE = "archive"
    #: Nothing, or nothing but zero bytes.
    EMPTY = "empty"


@dataclass(frozen=True, slots=True)
class Recognised:
    """A format: its name stands behind "the file is", its hint says what to do where safetensors were expected."""

    kind: Kind
    name: str
    hint: str


_TORCH_HINT = (
    "Load it as a base model (load_base_model, or load_model with is_init_step=True), which reads .bin, .pt and .pth "
    "files, or save its state dict as safetensors."
)
_FETCH_AGAIN = "Fetch the file again."
_UNPACK = "Unpack it and pass the file in it that holds the weights."
_TAR = "a tar archive (a packed directory, a .nemo file, or torch.save before 0.2)"
_USE_OTHERS = "cannot be loaded: use the model's safetensors or .bin files"


def _packed(name: str) -> Recognised:
    return Recognised(Kind.ARCHIVE, name, "Unpack it first.")


def _pointer(name: str, hint: str) -> Recognised:
    return Recognised(Kind.POINTER, f"a {name} pointer, not the file that it stands for", hint)


_GGML = Recognised(Kind.GGUF, "a GGML file (llama.cpp before GGUF)", f"GGML {_USE_OTHERS}.")
_LFS = _pointer("git LFS", "Run `git lfs pull` in the repository, or download the file itself (hf download).")
_HDF5_HINT = f"HDF5 {_USE_OTHERS}, or convert it with the tool that wrote it."
_PARQUET_HINT = "It holds a table: pass the file that holds the weights."

#: What stands at a byte of a file, and the format that it is the signature of.
_SIGNATURES: tuple[tuple[int, bytes, Recognised], ...] = (
    (0, b"GGUF", Recognised(Kind.GGUF, "a GGUF file (llama.cpp)", f"GGUF {_USE_OTHERS}.")),
    *((0, magic, _GGML) for magic in (b"lmgg", b"fmgg", b"tjgg", b"algg")),
    (0, b"\x93NUMPY", Recognised(Kind.FOREIGN, "a NumPy array (.npy)", "Save it with safetensors.numpy.save_file.")),
    (0, b"\x89HDF\r\n\x1a\n", Recognised(Kind.FOREIGN, "an HDF5 file (Keras, TensorFlow)", _HDF5_HINT)),
    (0, b"version https://git-lfs.github.com/spec/", _LFS),
    (0, b"version https://hawser.github.com/spec/", _LFS),
    (0, b"/annex/objects/", _pointer("git-annex", "Run `git annex get` for it in the repository.")),
    (0, b"\x1f\x8b", _packed("a gzip file")),
    (0, b"\x28\xb5\x2f\xfd", _packed("a Zstandard file")),
    (0, b"\xfd7zXZ\x00", _packed("an xz file")),
    (0, b"BZh", _packed("a bzip2 file")),
    (0, b"\x04\x22\x4d\x18", _packed("an LZ4 file")),
    (0, b"7z\xbc\xaf\x27\x1c", _packed("a 7-Zip archive")),
    (0, b"Rar!\x1a\x07", _packed("a RAR archive")),
    (0, b"PAR1", Recognised(Kind.FOREIGN, "a Parquet file", _PARQUET_HINT)),
    (0, b"%PDF-", Recognised(Kind.TEXT, "a PDF document", "Pass the file that holds the weights.")),
    (257, b"ustar", Recognised(Kind.ARCHIVE, _TAR, _UNPACK)),
    (4, b"TFL3", Recognised(Kind.FOREIGN, "a TensorFlow Lite model", f"It {_USE_OTHERS}.")),
)
#: torch's number of its own format before 1.6, as protocol 2 pickles it (torch.serialization.MAGIC_NUMBER).
_TORCH_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
_OLD_PICKLE = re.compile(rb"[(}\]](?:[dl]p\d|q\x00|\.|c|X)|c(?:torch|collections|__builtin__|numpy)")
_ONNX_START = re.compile(rb"\x08[\x01-\x20]\x12.[\x20-\x7e]{3}", re.DOTALL)
_MSGPACK_START = re.compile(rb"(?:[\x81-\x8f]|\xde..)(?:[\xa1-\xbf]|\xd9.)[\x20-\x7e]{2}", re.DOTALL)


def what_is(first_bytes: bytes) -> Recognised | None:
    """Name a format by the file's first `FIRST_BYTES` bytes, or all of it where it has fewer.

    ``None`` where no signature is there; damaged files and ones of unknown formats look like this. A file that begins
    as safetensors does is named so, whatever comes behind.
    """
    start = first_bytes[:FIRST_BYTES]
    if not start.strip(b"\0"):
        if start:
            hint = f"Its space was reserved and its content never arrived, or the disk lost it. {_FETCH_AGAIN}"
            return Recognised(Kind.EMPTY, "nothing but zero bytes where it begins", hint)
        return Recognised(Kind.EMPTY, "an empty file", f"The copy or download failed. {_FETCH_AGAIN}")
    if start[8:9] == b"{" and 2 <= int.from_bytes(start[:8], "little") <= _LONGEST_HEADER:
        return Recognised(Kind.SAFETENSORS, "a safetensors file", "Open it as such.")
    signed = next((found for at, magic, found in _SIGNATURES if start.startswith(magic, at)), None)
    return signed or _zip(start) or _pickle(start) or _text(start)


def what_is_file(path: str | os.PathLike[str]) -> Recognised | None:
    """Name a file's format; ``None`` also for what is no regular file, or cannot be read. Never raises."""
    try:
        with open_regular(path, FormatError) as (stream, _):
            return what_is(read_exactly(stream, FIRST_BYTES))
    except (ShardwiseError, ValueError):
        return None


def _zip(start: bytes) -> Recognised | None:
    if not start.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return None
    # The first entry's name: its length is at byte 26, and it begins at byte 30 (APPNOTE.TXT, 4.3.7).
    length = int.from_bytes(start[26:28], "little")
    name = start[30 : 30 + length]
    if re.search(rb"(?:^|/)(?:data\.pkl|data/\d+|version|byteorder)$", name):
        return Recognised(Kind.TORCH, "a zip archive as torch.save writes it (.pt, .pth, .ckpt, .bin)", _TORCH_HINT)
    if name.endswith(b".npy"):
        hint = "Save its arrays with safetensors.numpy.save_file."
        return Recognised(Kind.FOREIGN, "a zip archive of NumPy arrays (.npz)", hint)
    return Recognised(Kind.ARCHIVE, "a zip archive", _UNPACK)


def _pickle(start: bytes) -> Recognised | None:
    if start.startswith(_TORCH_MAGIC):
        return Recognised(Kind.TORCH, "a pickle as torch.save wrote it before torch 1.6", _TORCH_HINT)
    framed = len(start) > 2 and start[0] == 0x80 and 2 <= start[1] <= 5 and start[2:3] in b"\x95}]()c\x8aXKMN\x8c"
    if framed or _OLD_PICKLE.match(start):
        hint = (
            "If it holds a state dict of torch, load it as a base model; otherwise save what it holds as safetensors "
            "yourself, if you trust whoever wrote it."
        )
        return Recognised(Kind.TORCH, "a pickle", hint)
    if _ONNX_START.match(start):
        return Recognised(Kind.FOREIGN, "an ONNX model", f"ONNX {_USE_OTHERS}.")
    if _MSGPACK_START.match(start):
        return Recognised(Kind.FOREIGN, "MessagePack (Flax)", f"Flax weights {_USE_OTHERS}.")
    return None


def _text(start: bytes) -> Recognised | None:
    bare = start.removeprefix(b"\xef\xbb\xbf").lstrip(b" \t\r\n")
    low = bare[:15].lower()
    if low.startswith((b"<!doctype html", b"<html", b"<head", b"<body", b"<!--")):
        hint = "A server sent a page in its place (a login, an error, or one about the file): download the file itself."
        return Recognised(Kind.TEXT, "an HTML page", hint)
    if low.startswith((b"<?xml", b"<error")):
        hint = "A server sent it in the file's place, as buckets do for errors: download it again."
        return Recognised(Kind.TEXT, "an XML document", hint)
    if low[:1] in (b"{", b"[") and _readable(bare) is not None:
        hint = (
            "It is a configuration, an index, or a server's error message: pass the file that holds the weights, or "
            "the directory that an index lies in."
        )
        return Recognised(Kind.TEXT, "JSON text", hint)
    text = _readable(bare)
    if text is None:
        return None
    line = text.splitlines()[0][:60] if text else ""
    return Recognised(
        Kind.TEXT, f"plain text, which begins {line!r}", "It holds no weights: download or pass the file that does."
    )


def _readable(start: bytes) -> str | None:
    """The bytes as text, a character cut at the end aside; ``None`` where they are none."""
    try:
        text = start.decode("utf-8")
    except UnicodeDecodeError as error:
        if len(start) - error.start > 3 or len(start) < FIRST_BYTES - 16:
            return None
        text = start[: error.start].decode("utf-8")
    return text if text and all(char.isprintable() or char in "\t\r\n" for char in text) else None
