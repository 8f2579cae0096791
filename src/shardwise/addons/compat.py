"""Keeps copied model code importable under transformers releases that dropped a name which the code imports."""

from __future__ import annotations

import ast
import io
import logging
import re
import tokenize
from dataclasses import dataclass
from pathlib import Path

from shardwise.addons.files import read_source, write_bytes
from shardwise.errors import ShardwiseError

_LOG = logging.getLogger(__name__)

#: Name that transformers no longer has -> the module that had it, and the expression that stands in for it.
_REMOVED_TRANSFORMERS_SYMBOLS: dict[str, tuple[str, str]] = {
    "NEED_SETUP_CACHE_CLASSES_MAPPING": ("transformers.generation.utils", "{}"),
}

_LINE = re.compile(r"[^\r\n]*(?:\r\n|\n|\r)|[^\r\n]+")


@dataclass(frozen=True, slots=True)
class _Source:
    """A Python file, decoded as its declaration of encoding says, with its line ends as they are."""

    text: str
    encoding: str
    byte_order_mark: bytes
    tree: ast.Module


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
    source = _parse(data)
    if source is None:
        return
    wanted = [symbol for symbol in _imported_symbols(source.tree) if _marker(symbol) not in source.text]
    if not wanted:
        return
    guarded = _insert(source, wanted)
    write_bytes(path, source.byte_order_mark + guarded.encode(source.encoding))


def _parse(data: bytes) -> _Source | None:
    """Decode and parse ``data``, or ``None`` where it is not valid Python here."""
    mark = b"\xef\xbb\xbf" if data.startswith(b"\xef\xbb\xbf") else b""
    try:
        encoding, _ = tokenize.detect_encoding(io.BytesIO(data).readline)
        encoding = encoding.removesuffix("-sig")
        text = data.removeprefix(mark).decode(encoding)
        return _Source(text, encoding, mark, ast.parse(text))
    except (SyntaxError, ValueError, LookupError):
        return None


def _imported_symbols(tree: ast.Module) -> list[str]:
    """Removed symbols that the file imports from the module that had them, in the order of the table."""
    found = {
        (node.module, alias.name)
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.level == 0
        for alias in node.names
    }
    return [s for s, (module, _) in _REMOVED_TRANSFORMERS_SYMBOLS.items() if (module, s) in found]


def _marker(symbol: str) -> str:
    return f"# shardwise: {_REMOVED_TRANSFORMERS_SYMBOLS[symbol][0]}.{symbol} is absent from newer transformers."


def _insert(source: _Source, symbols: list[str]) -> str:
    """The text with guards for ``symbols`` before its first statement that may follow them."""
    first = re.search(r"\r\n|\n|\r", source.text)
    newline = first.group() if first else "\n"
    block = "".join(line + newline for symbol in symbols for line in _guard(symbol))
    position = _insertion_offset(source)
    head, tail = source.text[:position], source.text[position:]
    if head and not head.endswith(("\n", "\r")):
        head += newline
    return head + block + tail


def _guard(symbol: str) -> list[str]:
    module, stand_in = _REMOVED_TRANSFORMERS_SYMBOLS[symbol]
    return [
        _marker(symbol),
        f"import {module} as _shardwise_guarded",
        f'if not hasattr(_shardwise_guarded, "{symbol}"):',
        f"    _shardwise_guarded.{symbol} = {stand_in}",
        "del _shardwise_guarded",
    ]


def _insertion_offset(source: _Source) -> int:
    """Where in the text the guards go: the start of the first statement that is neither docstring nor future import."""
    body = source.tree.body
    index = next(i for i, statement in enumerate(body) if not _must_come_first(statement, i))
    statement = body[index]
    lines = _LINE.findall(source.text)
    first_line = min([statement.lineno, *(d.lineno for d in getattr(statement, "decorator_list", []))])
    start = sum(len(line) for line in lines[: first_line - 1])
    if index and body[index - 1].end_lineno == first_line:
        # A docstring or future import shares the line with the statement (`"""doc"""; import x`): break the line there.
        # Columns count bytes of UTF-8, whatever the file's encoding (ast).
        start += len(lines[first_line - 1].encode()[: statement.col_offset].decode())
    return start


def _must_come_first(statement: ast.stmt, index: int) -> bool:
    if isinstance(statement, ast.ImportFrom) and statement.module == "__future__":
        return True
    return (
        index == 0
        and isinstance(statement, ast.Expr)
        and isinstance(statement.value, ast.Constant)
        and isinstance(statement.value.value, str)
    )
