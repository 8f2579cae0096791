"""What a crash can leave on disk, from a log of operations.

The model is weaker than any journalling file system. Bytes written and not synced may be there, be gone, be zeros, or
be half there. A new name, a rename or a deletion in a directory that was not synced may have happened or not, each on
its own and in any combination; a rename is one step, as POSIX has it. A synced file's bytes and a synced directory's
names stay.

Of every prefix of the log all combinations are built that differ in what could be resumed from, as far as they are few;
of what lies in hidden directories, which nothing resumes from, the extremes.
"""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

#: A tree: path relative to the root -> content of a file, target of a link, ``None`` for a directory.
Tree = dict[str, "bytes | str | None"]

#: So many pending changes of the root are combined in every way; of more, prefixes and single losses.
_ALL_WAYS = 5


@dataclass
class _File:
    """A file's bytes: durable, and what was written since the last sync (``(offset, data)``.

    Offset -1 sets the size).
    """

    durable: bytes | None = None
    pending: list[tuple[int, bytes]] = field(default_factory=list)

    def content(self, how: str) -> bytes:
        """Bytes after a crash in which pending writes are ``all``, ``none``, ``zeros`` or ``torn``."""
        data = bytearray(self.durable or b"")
        if how == "none":
            return bytes(data)
        for offset, piece in self.pending:
            if offset < 0:
                size = int.from_bytes(piece, "little")
                data = bytearray(size)
                continue
            if how == "zeros":
                continue
            kept = piece if how == "all" else piece[: len(piece) // 2]
            data[offset : offset + len(kept)] = kept
        return bytes(data)


@dataclass
class _Directory:
    """A directory's names: durable, and changes since (each a set of assignments: name -> inode or None)."""

    durable: dict[str, int] = field(default_factory=dict)
    pending: list[dict[str, int | None]] = field(default_factory=list)

    def now(self) -> dict[str, int]:
        return self.names(range(len(self.pending)))

    def names(self, applied: Sequence[int] | range) -> dict[str, int]:
        """Names after a crash in which the changes with these numbers reached the disk."""
        found = dict(self.durable)
        for number in applied:
            for name, inode in self.pending[number].items():
                if inode is None:
                    found.pop(name, None)
                else:
                    found[name] = inode
        return found


class Disk:
    """Inodes, with what is durable and what is not."""

    def __init__(self, tree: Tree) -> None:
        self.inodes: list[_File | _Directory | str] = [_Directory()]
        for path, content in tree.items():
            node: _File | _Directory | str
            node = _Directory() if content is None else content if isinstance(content, str) else _File(content)
            self.inodes.append(node)
            where, _, name = path.rpartition("/")
            self._directory(where).durable[name] = len(self.inodes) - 1

    def _look(self, path: str) -> int | None:
        inode = 0
        for part in path.split("/") if path not in ("", ".") else ():
            node = self.inodes[inode]
            found = node.now().get(part) if isinstance(node, _Directory) else None
            if found is None:
                return None
            inode = found
        return inode

    def _directory(self, path: str) -> _Directory:
        inode = self._look(path)
        assert inode is not None, path
        node = self.inodes[inode]
        assert isinstance(node, _Directory), path
        return node

    def _file(self, path: str) -> _File:
        inode = self._look(path)
        assert inode is not None, path
        node = self.inodes[inode]
        assert isinstance(node, _File), path
        return node

    def _name(self, path: str, node: _File | _Directory | str) -> None:
        self.inodes.append(node)
        where, _, name = path.rpartition("/")
        self._directory(where).pending.append({name: len(self.inodes) - 1})

    def apply(self, record: Mapping[str, object]) -> None:
        """Carry out one logged operation."""
        kind, path = str(record["op"]), str(record["path"])
        if path.startswith("/") or kind == "space":
            return
        where, _, name = path.rpartition("/")
        if kind == "mkdir":
            if self._look(path) is None:  # the other rank may have seen it first
                self._name(path, _Directory())
        elif kind in ("create", "external"):
            data = bytes.fromhex(str(record["data"]))
            size = int(str(record.get("size", len(data))))
            if self._look(path) is None:
                self._name(path, _File(b""))
            self._file(path).pending += [(-1, size.to_bytes(8, "little")), (0, data)]
        elif kind == "write":
            self._file(path).pending.append((int(str(record["offset"])), bytes.fromhex(str(record["data"]))))
        elif kind == "sync":
            file = self._file(path)
            file.durable, file.pending = file.content("all"), []
        elif kind == "sync_dir":
            directory = self._directory(path)
            directory.durable, directory.pending = directory.now(), []
        elif kind == "symlink":
            self._name(path, str(record["target"]))
        elif kind == "remove":
            self._directory(where).pending.append({name: None})
        elif kind == "rename":
            source = str(record["source"])
            assert source.rpartition("/")[0] == where, "renames within one directory only"
            self._directory(where).pending.append({source.rpartition("/")[2]: None, name: self._look(source)})
        else:
            raise AssertionError(f"no such operation: {kind}")

    def crashes(self) -> Iterator[Tree]:
        """Every tree that a crash now could leave, within the bounds of this module."""
        root = self.inodes[0]
        assert isinstance(root, _Directory)
        below = [n for n, node in enumerate(self.inodes) if n and isinstance(node, _Directory) and node.pending]
        for applied in _subsets(len(root.pending)):
            visible = self._reachable(root.names(applied))
            exposed = [n for n in below if n in visible]
            choices: list[dict[int, list[int]]] = [
                {n: list(range(len(self._pending(n)))) for n in below},
                {n: [] for n in below},
            ]
            for n in exposed:
                count = len(self._pending(n))
                choices += [{**choices[0], n: [each for each in range(count) if each != lost]} for lost in range(count)]
            for choice, how in itertools.product(choices, ("all", "none", "zeros", "torn")):
                tree: Tree = {}
                self._build(tree, "", root.names(applied), choice, how)
                yield tree

    def _pending(self, inode: int) -> list[dict[str, int | None]]:
        node = self.inodes[inode]
        assert isinstance(node, _Directory)
        return node.pending

    def _reachable(self, names: Mapping[str, int]) -> set[int]:
        """Directories below visible names."""
        found: set[int] = set()
        todo = [inode for name, inode in names.items() if not name.startswith(".")]
        while todo:
            inode = todo.pop()
            node = self.inodes[inode]
            if isinstance(node, _Directory) and inode not in found:
                found.add(inode)
                todo += node.now().values()
        return found

    def _build(self, tree: Tree, prefix: str, names: Mapping[str, int], choice: dict[int, list[int]], how: str) -> None:
        for name, inode in sorted(names.items()):
            node = self.inodes[inode]
            if isinstance(node, _Directory):
                tree[prefix + name] = None
                self._build(tree, f"{prefix}{name}/", node.names(choice.get(inode, [])), choice, how)
            elif isinstance(node, str):
                tree[prefix + name] = node
            else:
                tree[prefix + name] = node.content(how)


def _subsets(count: int) -> Iterator[list[int]]:
    if count <= _ALL_WAYS:
        for size in range(count, -1, -1):
            yield from (list(each) for each in itertools.combinations(range(count), size))
        return
    everything = list(range(count))
    for number in range(count + 1):
        yield everything[:number]
    for lost in everything[:-1]:
        yield [each for each in everything if each != lost]


def read_tree(root: Path) -> Tree:
    """What stands in a directory, parents before children."""
    tree: Tree = {}
    for where, directories, names in os.walk(root):
        directories.sort()
        for name in sorted([*directories, *names]):
            path = Path(where) / name
            relative = path.relative_to(root).as_posix()
            if path.is_symlink():
                tree[relative] = os.readlink(path)
            else:
                tree[relative] = None if path.is_dir() else path.read_bytes()
    return tree


def write_tree(tree: Tree, root: Path) -> None:
    """Make a directory hold what a tree says, and nothing else."""
    for path, content in tree.items():
        place = root / path
        place.parent.mkdir(parents=True, exist_ok=True)
        if content is None:
            place.mkdir(exist_ok=True)
        elif isinstance(content, str):
            place.symlink_to(content)
        else:
            place.write_bytes(content)


def digest(tree: Tree) -> str:
    """Tells trees apart."""
    hasher = hashlib.blake2b(digest_size=16)
    for path, content in sorted(tree.items(), key=lambda item: item[0]):
        hasher.update(repr((path, content)).encode())
    return hasher.hexdigest()


def outline(tree: Tree) -> str:
    """Tells trees apart by what resolving and clearing up can see: bytes in hidden directories do not count."""
    hasher = hashlib.blake2b(digest_size=16)
    for path, content in sorted(tree.items(), key=lambda item: item[0]):
        hidden = path.startswith((".saving-", ".doomed-")) and isinstance(content, bytes)
        hasher.update(repr((path, b"" if hidden else content)).encode())
    return hasher.hexdigest()
