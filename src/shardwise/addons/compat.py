"""Keeps copied model code importable under transformers releases that dropped a name which the code imports."""

from __future__ import annotations

import ast
import codecs
import io
import logging
import re
import tokenize
from pathlib import Path

from shardwise.addons.files import read_source, write_bytes
from shardwise.errors import ShardwiseError

_LOG = logging.getLogger(__name__)

#: Name that transformers no longer has -> the module that had it, and the expression that stands in for it.
_REMOVED_TRANSFORMERS_SYMBOLS: dict[str, tuple[str, str]] = {
    "NEED_SETUP_CACHE_CLASSES_MAPPING": ("transformers.generation.utils", "{}"),
}

_LINE = re.compile(r"[^\r\n]*(?:\r\n|\n|\r)|[^\r\n]+")


def _apply_transformers_compat_guards(py_path: str) -> None:
    """Guard imports of transformers symbols removed in newer versions.

    Where ``py_path`` does ``from <module> import ... <symbol> ...`` and the symbol is one of
    `_REMOVED_TRANSFORMERS_SYMBOLS`, lines are inserted that define the symbol on the module if it is absent, so that
    the import resolves. They come after the module's docstring and its ``from __future__`` imports, in the file's own
    encoding and line ends. Any other file, and one that is no Python of this interpreter's, keeps every byte. Running
    it again changes nothing. The file is parsed, never executed. A path that is absent or cannot be read has no import
    to guard, and is left alone: who copies or imports the file meets that error.

    Args:
        py_path: A ``.py`` file.

    Raises:
        StorageError: The guarded file cannot be written.
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
    guards = [guard for symbol in _imported_symbols(tree) if (guard := _guard(symbol))[0] not in text]
    if guards:
        write_bytes(path, mark + _inserted(text, tree, guards).encode(encoding))


def _imported_symbols(tree: ast.Module) -> list[str]:
    """Removed symbols that the file imports from the module that had them, in the order of the table."""
    found = {
        (node.module, alias.name)
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.level == 0
        for alias in node.names
    }
    return [s for s, (module, _) in _REMOVED_TRANSFORMERS_SYMBOLS.items() if (module, s) in found]


def _inserted(text: str, tree: ast.Module, guards: list[list[str]]) -> str:
    """The text with guards before its first statement that is neither docstring nor future import."""
    first = re.search(r"\r\n|\n|\r", text)
    newline = first.group() if first else "\n"
    position = _insertion_offset(text, tree)
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


def _insertion_offset(text: str, tree: ast.Module) -> int:
    body = tree.body
    index = next(i for i, statement in enumerate(body) if not _must_come_first(statement, i))
    statement = body[index]
    lines = _LINE.findall(text)
    first_line = min([statement.lineno, *(d.lineno for d in getattr(statement, "decorator_list", []))])
    start = sum(len(line) for line in lines[: first_line - 1])
    if index and body[index - 1].end_lineno == first_line:
        # A docstring or future import shares the line with the statement (`"""doc"""; import x`): break the line there.
        # Columns count bytes of UTF-8, whatever the file's encoding (ast).
        start += len(lines[first_line - 1].encode()[: statement.col_offset].decode())
    return start


def _must_come_first(statement: ast.stmt, index: int) -> bool:
    if isinstance(statement, ast.ImportFrom):
        return statement.module == "__future__"
    constant = statement.value if isinstance(statement, ast.Expr) else None
    return index == 0 and isinstance(constant, ast.Constant) and isinstance(constant.value, str)
