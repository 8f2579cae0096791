"""Copies the Python files of a custom model beside its weights. Nothing here runs or imports what it copies.

Copied code is kept importable under transformers releases that dropped a name which the code imports.
"""

from __future__ import annotations

import ast
import codecs
import io
import logging
import os
import re
import sys
import tokenize
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from shardwise.addons.files import copy_file, read_source, write_bytes
from shardwise.base.files import find_directory
from shardwise.disk.names import is_directory, is_file, real_path, walk
from shardwise.errors import ShardwiseError
from shardwise.stateful_wrappers.wrapping import bare_model, original_class
from shardwise.upstream.transformers import NAME_OR_PATH, auto_class

if TYPE_CHECKING:
    import torch
    import torch.nn as nn

_LOG = logging.getLogger(__name__)

#: The package under which transformers imports code that comes with a model (transformers.utils.hub).
_CACHE_PACKAGE = "transformers_modules"

#: A revision folder in that package: a commit of a hub model, or a digest of a local one's sources.
_REVISION = re.compile(r"[0-9a-f]{40}|[0-9a-f]{16}")

_DOTTED = re.compile(r"\w+(?:\.\w+)+")


def _iter_custom_code_classes(model_part: torch.nn.Module) -> Iterator[type]:
    """Yield classes referenced by ``config.auto_map`` (and the model's own class).

    The model's and its config's full method resolution orders are walked, because FSDP2 and other mixins put classes
    of their own in front of the one that was loaded. A class counts as custom if it was loaded from a model directory
    (its module is in ``transformers_modules``) or was registered for an auto class. References of ``auto_map`` are
    looked up among the modules that are loaded already; nothing is imported.

    Each custom class is given once, the model's own first.
    """
    model = bare_model(model_part)
    config: object = getattr(model, "config", None)
    seen: dict[type, None] = {}
    families = _families_of_name(getattr(config, NAME_OR_PATH, None))
    for cls in (*type(model).__mro__, *type(config).__mro__):
        if _in_cache(cls.__module__) or auto_class(cls) is not None:
            seen[cls] = None
            families.add(_family(cls.__module__))
    for reference in auto_map_references(config):
        repo, _, target = reference.rpartition("--")
        if not any(f"{cls.__module__}.{cls.__name__}".endswith("." + target) for cls in seen):
            seen.update(dict.fromkeys(_loaded_classes(target, _families_of_name(repo) if repo else families)))
    yield from seen


def auto_map_references(config: object) -> list[str]:
    """The class references in a config's ``auto_map`` (``[repo--]module.Class``); a config may also be a dict."""
    found = config.get("auto_map") if isinstance(config, Mapping) else getattr(config, "auto_map", None)
    if not isinstance(found, Mapping):
        return []
    listed = [value if isinstance(value, (list, tuple)) else [value] for value in found.values()]
    return [reference for values in listed for reference in values if isinstance(reference, str) and "." in reference]


def _maybe_save_custom_model_code(
    original_model_path: str | None, hf_metadata_dir: str, model_part: torch.nn.Module | None = None
) -> None:
    """Save the custom model code if it exists. This function preserves the original directory structure.

    1. Where ``original_model_path`` is a local directory, its ``.py`` files are copied; where it is a single ``.py``
       file, that file and the files beside it that it imports relatively.
    2. Where ``model_part`` has custom classes, the ``.py`` files of the ``transformers_modules`` directories that they
       were loaded from are added, so that a model loaded by hub id carries its code and reloads without the hub.
    3. Where ``auto_map`` names modules that are still absent, they are taken from the hub cache, with what they import.

    ``__init__.py`` files are left out, as are hidden directories and the directory that is being written. A symbolic
    link is followed only to a target inside the base directory or among the blobs of a hub cache. Imports of names that
    transformers removed are guarded. Called on the rank that writes; a file that cannot be read or written is a
    `StorageError`.
    """
    target = Path(hf_metadata_dir)
    copied = _Copies(target)
    if original_model_path and is_directory(Path(original_model_path)):
        base = Path(original_model_path)
        copied.add_all(_python_files(base, target), base)
    elif original_model_path and is_file(Path(original_model_path)):
        single = Path(original_model_path)
        if single.suffix == ".py" and single.name != "__init__.py":
            copied.add_all(_with_relative_imports(single, single.parent), single.parent)
    if model_part is not None:
        for cls in _iter_custom_code_classes(model_part):
            _add_class(copied, cls, target)
        config = getattr(bare_model(model_part), "config", None)
        _add_referenced(copied, auto_map_references(config), original_model_path)
    for path in copied.written:
        _apply_transformers_compat_guards(str(path))


class _Copies:
    """Copies files below one directory; the first source of a relative path wins."""

    def __init__(self, target: Path) -> None:
        self.target = target
        self.written: list[Path] = []
        self.sources: dict[Path, Path] = {}  # by relative path

    def add_all(self, files: list[Path], root: Path) -> None:
        """Copy ``files``, which lie below ``root``, to the same relative paths."""
        for file in files:
            self.add(file, file.relative_to(root))

    def add(self, source: Path, relative: Path) -> None:
        """Copy the bytes of ``source`` to ``relative``, unless another source was copied there."""
        first = self.sources.get(relative)
        if first is not None:
            if first != source and read_source(first) != read_source(source):
                _LOG.warning("custom code: %s is kept, the different file %s is left out", first, source)
            return
        self.sources[relative] = source
        copy_file(source, self.target / relative)
        self.written.append(self.target / relative)


def _python_files(base: Path, target: Path) -> list[Path]:
    """The ``.py`` files below ``base`` that are part of a model, in a fixed order."""
    root, inside = real_path(base), real_path(target)
    # A run that saves below the model directory must not copy the code of its own earlier checkpoints.
    own = root / inside.relative_to(root).parts[0] if inside != root and inside.is_relative_to(root) else None
    found: list[Path] = []

    def enters(folder: Path) -> bool:
        return not folder.name.startswith(".") and folder.name != "__pycache__" and real_path(folder) != own

    for here, names in walk(base, enters):
        for name in names:
            path = here / name
            if not name.endswith(".py") or name == "__init__.py":
                continue
            if is_file(path) and _is_inside(path, base):
                found.append(path)
            else:
                _LOG.warning("custom code: %s is left out, its link leaves the model directory", path)
    return sorted(found)


def _is_inside(path: Path, base: Path) -> bool:
    """Whether ``path``, its links followed, is a file of ``base`` or a blob of a hub cache.

    The hub cache keeps a model's files as ``models--<org>--<name>/blobs/<digest>`` and makes snapshots of links to
    them (huggingface_hub, "Understand caching").
    """
    resolved = real_path(path)
    if resolved.is_relative_to(real_path(base)):
        return True
    return resolved.parent.name == "blobs" and resolved.parent.parent.name.startswith("models--")


def _with_relative_imports(file: Path, root: Path) -> list[Path]:
    """``file`` and the files below ``root`` that it needs through relative imports, however indirectly."""
    pending, found = [file], {file: None}
    while pending:
        for needed in _relatively_imported(pending.pop()):
            if needed not in found and needed.is_relative_to(root) and is_file(needed) and _is_inside(needed, root):
                found[needed] = None
                pending.append(needed)
    return [path for path in found if path.name != "__init__.py"]


def _relatively_imported(file: Path) -> Iterator[Path]:
    """Where the modules would be that ``file`` imports relatively; some of the paths may not exist."""
    try:
        tree = ast.parse(read_source(file))
    except (SyntaxError, ValueError):
        _LOG.warning("custom code: %s is not valid Python, what it imports is not followed", file)
        return
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or not 0 < node.level <= len(file.parents):
            continue
        package = file.parents[node.level - 1]
        module = package.joinpath(*node.module.split(".")) if node.module else package
        for path in (module, *(module / alias.name for alias in node.names if alias.name != "*")):
            yield path.with_name(path.name + ".py")
            yield path / "__init__.py"


def _add_class(copied: _Copies, cls: type, target: Path) -> None:
    """Copy the code of one custom class."""
    name = getattr(sys.modules.get(cls.__module__), "__file__", None)
    if not (isinstance(name, str) and name.endswith(".py") and is_file(file := Path(name))):
        _LOG.warning("custom code: the source of %s.%s is not a file, it is left out", cls.__module__, cls.__qualname__)
        return
    if _in_cache(cls.__module__):
        # The directory of the cache that mirrors the model directory which the file came from.
        parts = cls.__module__.split(".")[:-1]
        revision = _revision_index(parts)
        root = file.parent if revision is None else file.parents[len(parts) - 1 - revision]
        copied.add_all(_python_files(root, target), root)
    else:
        # The user's own class, registered for an auto class: transformers expects its module at the top level.
        copied.add_all(_with_relative_imports(file, file.parent), file.parent)


def _add_referenced(copied: _Copies, references: list[str], original_model_path: str | None) -> None:
    """Copy modules that ``auto_map`` names and that no earlier source had, from the hub cache."""
    for reference in references:
        repo, _, dotted = reference.rpartition("--")
        if not _DOTTED.fullmatch(dotted):
            continue
        relative = Path(*dotted.split(".")[:-1]).with_suffix(".py")
        base = None if relative in copied.sources else find_directory(repo or original_model_path)
        if base is None or not is_file(base / relative) or not _is_inside(base / relative, base):
            continue
        copied.add_all(_with_relative_imports(base / relative, base), base)


def _in_cache(module: str) -> bool:
    return module.startswith(_CACHE_PACKAGE + ".")


def _family(module: str) -> str:
    """The common prefix of one model's modules, whatever revision: ``transformers_modules.<org>.<name>``."""
    parts = module.split(".")[:-1]
    revision = _revision_index(parts)
    return ".".join(parts if revision is None else parts[:revision])


def _revision_index(parts: list[str]) -> int | None:
    return next((i for i in reversed(range(1, len(parts))) if _REVISION.fullmatch(parts[i])), None)


def _families_of_name(name: object) -> set[str]:
    """The packages that transformers would load the code of ``name`` (hub id or directory) into."""
    if not isinstance(name, str) or not name:
        return set()
    folders = [os.path.basename(os.path.normpath(name))] if is_directory(Path(name)) else name.split("/")
    # Source: transformers.dynamic_module_utils.
    names = [folder.replace(".", "_dot_").replace("-", "_hyphen_") for folder in folders]
    return {".".join([_CACHE_PACKAGE, *(f"_{name}" if name[:1].isdigit() else name for name in names)])}


def _loaded_classes(target: str, families: set[str]) -> list[type]:
    """Classes called ``module.Class`` in loaded modules of the given families."""
    stem, _, class_name = target.rpartition(".")
    found: list[type] = []
    for name, module in sorted(sys.modules.items()):
        if _in_cache(name) and name.endswith("." + stem) and _family(name) in families:
            value = vars(module).get(class_name) if isinstance(module, ModuleType) else None
            if isinstance(value, type):
                found.append(value)
    return found


def custom_auto_map(model: nn.Module, config: object) -> dict[str, str]:
    """The ``auto_map`` entries of classes that were registered for an auto class, as transformers would write them."""
    entries: dict[str, str] = {}
    for cls in (original_class(model), type(config)):
        registered = auto_class(cls)
        if isinstance(registered, str) and cls.__module__ != "__main__":
            entries[registered] = f"{cls.__module__.rpartition('.')[2]}.{cls.__name__}"
    return entries


# --- imports of what transformers dropped ----------------------------------------------------------------------------


#: Name that transformers no longer has -> the module that had it, and the expression that stands in for it.
_REMOVED_TRANSFORMERS_SYMBOLS: dict[str, tuple[str, str]] = {
    "NEED_SETUP_CACHE_CLASSES_MAPPING": ("transformers.generation.utils", "{}"),
}


def _apply_transformers_compat_guards(py_path: str) -> None:
    """Guard imports of transformers symbols removed in newer versions.

    Where ``py_path`` does ``from <module> import ... <symbol> ...`` and the symbol is one of
    `_REMOVED_TRANSFORMERS_SYMBOLS`, lines are inserted that define the symbol on the module if it is absent, so that
    the import resolves. They come after the module's docstring and its ``from __future__`` imports, in the file's own
    encoding and line ends. Any other file, and one that is no Python of this interpreter's, keeps every byte. Running
    it again changes nothing. The file is parsed, never executed. A path that is absent or cannot be read has no import
    to guard, and is left alone: who copies or imports the file meets that error. A `StorageError` says that the guarded
    file cannot be written.
    """
    path = Path(py_path)
    try:
        data = read_source(path)
    except ShardwiseError as error:
        _LOG.debug("no imports guarded in %s: %s", path, error)
        return
    if not any(symbol.encode() in data for symbol in _REMOVED_TRANSFORMERS_SYMBOLS):
        return
    mark = codecs.BOM_UTF8 if data.startswith(codecs.BOM_UTF8) else b""
    try:
        encoding = tokenize.detect_encoding(io.BytesIO(data).readline)[0].removesuffix("-sig")
        text = data.removeprefix(mark).decode(encoding)
        tree = ast.parse(text)
    except (SyntaxError, ValueError, LookupError):
        return
    imported = {
        (node.module, alias.name)
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.level == 0
        for alias in node.names
    }
    removed = [symbol for symbol, (module, _) in _REMOVED_TRANSFORMERS_SYMBOLS.items() if (module, symbol) in imported]
    guards = [guard for symbol in removed if (guard := _guard(symbol))[0] not in text]
    if guards:
        write_bytes(path, mark + _inserted(text, tree, guards).encode(encoding))


def _inserted(text: str, tree: ast.Module, guards: list[list[str]]) -> str:
    """The text with guards before its first statement that is neither docstring nor future import."""
    first = re.search(r"\r\n|\n|\r", text)
    newline = first.group() if first else "\n"
    body = tree.body
    index = next(i for i, statement in enumerate(body) if not _must_come_first(statement, i))
    lines = list(io.StringIO(text, newline=""))
    first_line = min([body[index].lineno, *(d.lineno for d in getattr(body[index], "decorator_list", []))])
    position = sum(len(line) for line in lines[: first_line - 1])
    if index and body[index - 1].end_lineno == first_line:
        # A docstring or future import shares the line with the statement (`"""doc"""; import x`): break the line there.
        # Columns count bytes of UTF-8, whatever the file's encoding (ast).
        position += len(lines[first_line - 1].encode()[: body[index].col_offset].decode())
    head = text[:position]
    if head and not head.endswith(("\n", "\r")):
        head += newline
    return head + "".join(line + newline for guard in guards for line in guard) + text[position:]


def _guard(symbol: str) -> list[str]:
    module, stand_in = _REMOVED_TRANSFORMERS_SYMBOLS[symbol]
    return [
        f"# shardwise: {module}.{symbol} is absent from newer transformers.",
        f"import {module} as _shardwise_guarded",
        f'if not hasattr(_shardwise_guarded, "{symbol}"):',
        f"    _shardwise_guarded.{symbol} = {stand_in}",
        "del _shardwise_guarded",
    ]


def _must_come_first(statement: ast.stmt, index: int) -> bool:
    if isinstance(statement, ast.ImportFrom):
        return statement.module == "__future__"
    constant = statement.value if isinstance(statement, ast.Expr) else None
    return index == 0 and isinstance(constant, ast.Constant) and isinstance(constant.value, str)
