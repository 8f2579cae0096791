"""What touches a disk goes through `shardwise.disk`, so that faults, records and other storages can stand in its place.

Looking at names (``is_file``, ``listdir``) counts too: another storage has other names.
"""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path

import shardwise

ROOT = Path(shardwise.__file__).parent

_OS = frozenset(
    {
        *("open", "read", "write", "pread", "preadv", "pwrite", "fsync", "truncate", "ftruncate", "rename", "replace"),
        *("link", "symlink", "unlink", "remove", "mkdir", "makedirs", "rmdir", "removedirs", "utime", "chmod"),
        *("stat", "lstat", "listdir", "scandir", "walk", "access", "readlink", "statvfs"),
    }
)
_OS_PATH = frozenset(
    {
        *("exists", "lexists", "isfile", "isdir", "islink", "ismount", "realpath", "samefile"),
        *("getsize", "getmtime", "getatime", "getctime"),
    }
)
_PATH = frozenset(
    {
        *("read_bytes", "read_text", "write_bytes", "write_text"),
        *("mkdir", "unlink", "rmdir", "touch", "symlink_to", "hardlink_to", "chmod"),
        *("exists", "is_file", "is_dir", "is_symlink", "is_mount", "stat", "lstat", "samefile"),
        *("iterdir", "glob", "rglob", "resolve", "readlink"),
    }
)

#: How often a module touches a disk by itself, and why. Only to be made shorter.
ALLOWED: dict[str, tuple[int, str]] = {
    "addons/files.py": (2, "the private directory of this machine that libraries write into"),
    "sources/hub_cache.py": (2, "huggingface_hub's cache lies on a disk of this machine"),
    "cli/output.py": (1, "the null device, in place of a pipe that nobody reads any more"),
    "comm/lost_ranks.py": (1, "a process's state in /proc"),
    "lifecycle/ownership.py": (6, "locks of processes, which a remote storage has none of"),
    "settings.py": (1, "the user's configuration file"),
}


def touches(tree: ast.AST) -> int:
    """How many calls below ``tree`` read or change files by themselves."""
    return sum(isinstance(node, ast.Call) and _is_touch(node) for node in ast.walk(tree))


def _is_touch(call: ast.Call) -> bool:
    function = call.func
    if isinstance(function, ast.Name):
        return function.id == "open"
    if not isinstance(function, ast.Attribute):
        return False
    owner = function.value.id if isinstance(function.value, ast.Name) else ""
    if owner in ("os", "fcntl", "shutil", "tempfile"):
        return owner != "os" or function.attr in _OS
    if isinstance(function.value, ast.Attribute) and ast.unparse(function.value) == "os.path":
        return function.attr in _OS_PATH
    opens = function.attr == "open" and bool(call.args) and isinstance(call.args[0], ast.Constant)
    return opens or function.attr in _PATH


def test_what_counts() -> None:
    text = (
        "os.open(p, 0); p.open('rb'); storage.open(p, writable=True); open(p); p.unlink(); shutil.rmtree(p); "
        "p.exists(); os.path.isdir(p); os.path.join(p, q); os.listdir(p); is_file(p); storage.status(p); ast.walk(p)"
    )
    assert touches(ast.parse(text)) == 8


def test_only_the_disk_package_touches_a_disk() -> None:
    found = Counter[str]()
    for file in sorted(ROOT.rglob("*.py")):
        name = file.relative_to(ROOT).as_posix()
        count = touches(ast.parse(file.read_text()))
        # The directories of a host's own files are on a disk of this machine, where the host writes by itself.
        if count and not name.startswith(("disk/", "integrations/")):
            found[name] = count
    assert dict(found) == {name: count for name, (count, _) in ALLOWED.items()}
