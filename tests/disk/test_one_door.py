"""What touches a disk goes through `shardwise.disk`, so that faults, records and other storages can stand in its place.

Looking at names (``exists``, ``listdir``) is not counted: it changes nothing and reads no content.
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
    }
)
_PATH = frozenset(
    {
        *("read_bytes", "read_text", "write_bytes", "write_text"),
        *("mkdir", "unlink", "rmdir", "touch", "symlink_to", "hardlink_to", "chmod"),
    }
)

#: How often a module touches a disk by itself, and why. Only to be made shorter.
ALLOWED: dict[str, tuple[int, str]] = {
    "addons/compat.py": (2, "guards the code of other models; the addons write past the storage, as tokenizers do"),
    "addons/custom_code.py": (3, "likewise"),
    "addons/files.py": (4, "likewise"),
    "addons/huggingface.py": (3, "likewise"),
    "addons/peft.py": (2, "likewise"),
    "addons/side_files.py": (2, "likewise"),
    "checkpointing/saving/models.py": (1, "the script beside shards may be executed"),
    "cli.py": (1, "the null device, in place of a pipe that nobody reads any more"),
    "comm/lost_ranks.py": (1, "a process's state in /proc"),
    "lifecycle/ownership.py": (5, "locks of processes, which a remote storage has none of"),
    "ops/consolidate.py": (1, "removes the empty directories that it made"),
    "ops/torch_archives.py": (2, "zipfile reads from files of its own"),
    "settings.py": (1, "the user's configuration file"),
    "sources/dcp_extents.py": (3, "looks at the first and last bytes of items"),
    "sources/torch_state.py": (1, "zipfile reads from files of its own"),
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
    opens = function.attr == "open" and bool(call.args) and isinstance(call.args[0], ast.Constant)
    return opens or function.attr in _PATH


def test_what_counts() -> None:
    text = (
        "os.open(p, 0); p.open('rb'); storage.open(p, writable=True); open(p); p.unlink(); p.exists(); shutil.rmtree(p)"
    )
    assert touches(ast.parse(text)) == 5


def test_only_the_disk_package_touches_a_disk() -> None:
    found = Counter[str]()
    for file in sorted(ROOT.rglob("*.py")):
        name = file.relative_to(ROOT).as_posix()
        count = touches(ast.parse(file.read_text()))
        if count and not name.startswith("disk/"):
            found[name] = count
    assert dict(found) == {name: count for name, (count, _) in ALLOWED.items()}
