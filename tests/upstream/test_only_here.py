"""Private and undocumented names of other libraries are read in `shardwise.upstream` alone, and are on its list."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from shardwise.upstream.names import ALL, BY_MODULE, Name

SOURCE = Path(__file__).parents[2] / "src" / "shardwise"
UPSTREAM = SOURCE / "upstream"

#: Not other libraries' private names, though they look like it.
_DOCUMENTED = {"_replace", "_asdict", "_fields", "_exit", "_typeshed"}
#: Contracts of models, which `shardwise.addons` documents.
_OF_MODELS = {"_get_consolidated_hf_metadata_exporter"}

_FILES = sorted(path for path in SOURCE.rglob("*.py") if UPSTREAM not in path.parents)
#: Modules of libraries that are undocumented as a whole, or a name in them.
_UNDOCUMENTED = {name.path for name in ALL if ":" not in name.path and not name.path.startswith("@")}
#: What is listed and stands in code as text.
_WORDS = {re.split(r"[.:]", name.path)[-1] for name in ALL}


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name.strip("_") != ""


def _own_names(tree: ast.AST) -> set[str]:
    """Private names that a file itself defines: attributes of its classes, functions and variables."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and _is_self(node.value):
            found.add(node.attr)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {target.id for target in targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "__setattr__":
            found |= {str(each.value) for each in node.args if isinstance(each, ast.Constant)}
    return found


def _is_self(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def _imported(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and full path of what a file imports from elsewhere."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level == 0 and not (node.module or "").startswith("shardwise"):
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names if not alias.name.startswith("shardwise"))


def _read(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and name of the private attributes that a file reads of objects not its own, or has as text."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and _is_private(node.attr) and not _is_self(node.value):
            yield node.lineno, node.attr
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            named = node.args[1] if node.func.id in ("getattr", "hasattr", "setattr", "delattr") else None
            if isinstance(named, ast.Constant) and _is_private(str(named.value)):
                yield node.lineno, str(named.value)
        elif isinstance(node, ast.Constant) and _is_private(str(node.value)) and node.value in _WORDS:
            yield node.lineno, str(node.value)


def _offences(source: str) -> list[str]:
    tree = ast.parse(source)
    own = _own_names(tree)
    found = [
        f"line {line}: {name}" for line, name in _read(tree) if name not in (own - _WORDS) | _DOCUMENTED | _OF_MODELS
    ]
    for line, path in _imported(tree):
        private = any(_is_private(part) and part not in _DOCUMENTED for part in path.split("."))
        if private or path in _UNDOCUMENTED:
            found.append(f"line {line}: {path}")
    return found


def test_no_other_package_reads_a_private_name() -> None:
    found = {
        path.relative_to(SOURCE).as_posix(): offences for path in _FILES if (offences := _offences(path.read_text()))
    }
    assert not found, "put functions around these into shardwise.upstream"


@pytest.mark.parametrize(
    "code",
    [
        "from torch._utils import thing",
        "from torch.distributed.checkpoint.filesystem import _StorageInfo",
        "import torch._dynamo",
        "from transformers.core_model_loading import WeightConverter",
        "def f(module): return module._parameters",
        "def f(model): return getattr(model, '_something', None)",
        "KEYS = ('_buffers',)",
    ],
)
def test_such_reading_is_found(code: str) -> None:
    assert _offences(code)


def test_what_is_ones_own_is_not_an_offence() -> None:
    code = """
class Row:
    def __init__(self): self._cells = []
    def join(self, other): return self._cells + other._cells
def f(pair): return pair._replace(first=1)
"""
    assert not _offences(code)


@pytest.mark.parametrize("module", sorted(BY_MODULE))
def test_the_list_and_the_code_agree(module: str) -> None:
    source = (UPSTREAM / f"{module}.py").read_text()
    if module == "torch_distributed":
        source += (SOURCE / "comm" / "collectives.py").read_text()
    tree = ast.parse(source)
    names = BY_MODULE[module]
    listed = {part for name in names for part in re.split(r"[.:]", name.path)}
    used = {name for _, name in _read(tree)} | {
        str(node.value) for node in ast.walk(tree) if isinstance(node, ast.Constant) and _is_private(str(node.value))
    }
    used = {name for name in used if name.isidentifier()} - {"_hf_"} - _own_names(tree)
    unlisted = sorted(used - listed) + sorted(
        path
        for _, path in _imported(tree)
        if any(map(_is_private, path.split("."))) and path not in {name.path for name in names}
    )
    assert not unlisted, f"{module} reads what shardwise.upstream.names does not list"
    unused = [name.path for name in names if not _is_used(name, source)]
    assert not unused, f"shardwise.upstream.names lists what {module} does not read"


def _is_used(name: Name, source: str) -> bool:
    word = re.split(r"[.:]", name.path)[-1]
    return {"__new__": "DTensor(", "_hf_hook": "_hf_"}.get(word, word) in source


def test_every_module_has_its_names() -> None:
    modules = {path.stem for path in UPSTREAM.glob("*.py")} - {"__init__", "names"}
    assert modules == set(BY_MODULE)
