"""Compat guards: inserted where a removed name is imported, once, and nowhere else."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardwise.addons import _REMOVED_TRANSFORMERS_SYMBOLS, _apply_transformers_compat_guards

SYMBOL = "NEED_SETUP_CACHE_CLASSES_MAPPING"
IMPORT = f"from transformers.generation.utils import {SYMBOL}\n"

HEADS = {
    "nothing": "",
    "a comment": "#!/usr/bin/env python\n# Licence.\n\n",
    "a docstring": '"""What this is."""\n\nimport os\n',
    "a docstring of several lines": "'''One.\n\nTwo.\n'''\n",
    "future imports": '"""Doc."""\nfrom __future__ import annotations\nfrom __future__ import (\n    division,\n)\n',
    "a docstring on the same line": '"""Dök."""; ',
    "a future import on the same line": "from __future__ import annotations; ",
    "a decorated function": "@staticmethod\ndef f():\n    return 1\n",
    "a form feed": "x = 1\n\x0c\ny = 2\n",
    "a class": "class A:\n    pass\n",
}

IMPORTS = {
    "plain": IMPORT,
    "as": f"from transformers.generation.utils import {SYMBOL} as CACHES\n",
    "among others": f"from transformers.generation.utils import GenerationMixin, {SYMBOL}\n",
    "parentheses": f"from transformers.generation.utils import (\n    GenerationMixin,\n    {SYMBOL},  # gone\n)\n",
    "backslash": f"from transformers.generation.utils import \\\n    {SYMBOL}\n",
    "in a function": f"def g():\n    from transformers.generation.utils import {SYMBOL}\n    return {SYMBOL}\n",
}


def guarded(path: Path, source: bytes) -> bytes:
    path.write_bytes(source)
    _apply_transformers_compat_guards(str(path))
    return path.read_bytes()


def stand_in_transformers(directory: Path) -> Path:
    """A package that has the module and not the name."""
    package = directory / "transformers" / "generation"
    package.mkdir(parents=True)
    (package.parent / "__init__.py").write_text("")
    (package / "__init__.py").write_text("")
    (package / "utils.py").write_text("class GenerationMixin: ...\n")
    return directory


@pytest.fixture(scope="module")
def stub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stand_in_transformers(tmp_path_factory.mktemp("stub"))


@pytest.mark.parametrize("head", HEADS)
def test_the_guarded_file_runs_where_the_name_is_gone(head: str, stub: Path, tmp_path: Path) -> None:
    script = "import runpy, sys\nfor path in sys.argv[1:]:\n    runpy.run_path(path, run_name=path)\n"
    paths = []
    for kind, statement in IMPORTS.items():
        if HEADS[head].endswith("; ") and kind == "in a function":
            continue
        path = tmp_path / f"{kind.replace(' ', '_')}.py"
        after = guarded(path, (HEADS[head] + statement).encode())
        assert after != (HEADS[head] + statement).encode()
        assert guarded(path, after) == after
        paths.append(str(path))
    # -S -E keep the real transformers out of the way.
    command = [sys.executable, "-S", "-E", "-c", f"import sys; sys.path.insert(0, {str(stub)!r})\n{script}", *paths]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_unguarded_the_same_file_does_not_run(stub: Path, tmp_path: Path) -> None:
    path = tmp_path / "m.py"
    path.write_text(IMPORT)
    command = [sys.executable, "-S", "-E", "-c", f"import sys, runpy; sys.path.insert(0, {str(stub)!r})"]
    command[-1] += f"; runpy.run_path({str(path)!r})"
    assert "cannot import name" in subprocess.run(command, capture_output=True, text=True).stderr


def test_a_name_that_is_there_keeps_its_value(tmp_path: Path) -> None:
    package = stand_in_transformers(tmp_path)
    (package / "transformers" / "generation" / "utils.py").write_text(f"{SYMBOL} = {{'static': 1}}\n")
    path = tmp_path / "m.py"
    guarded(path, f"{IMPORT}print({SYMBOL})\n".encode())
    command = [sys.executable, "-S", "-E", "-c", f"import sys, runpy; sys.path.insert(0, {str(package)!r})"]
    command[-1] += f"; runpy.run_path({str(path)!r})"
    assert subprocess.run(command, capture_output=True, text=True).stdout == "{'static': 1}\n"


@pytest.mark.parametrize(
    "source",
    [
        "import os\n",
        f"# {SYMBOL}\nname = '{SYMBOL}'\n",
        f"from transformers import {SYMBOL}\n",
        f"from elsewhere.generation.utils import {SYMBOL}\n",
        f"from .utils import {SYMBOL}\n",
        f"from transformers.generation.utils import GenerationMixin as {SYMBOL}\n",
        f"print '{SYMBOL}' is not Python 3\n{IMPORT}",
        f"{IMPORT}\x00",
        "",
    ],
)
def test_files_that_import_no_removed_name_keep_every_byte(source: str, tmp_path: Path) -> None:
    path = tmp_path / "m.py"
    path.write_bytes(source.encode())
    before = path.stat().st_mtime_ns
    _apply_transformers_compat_guards(str(path))
    assert path.read_bytes() == source.encode()
    assert path.stat().st_mtime_ns == before


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
def test_line_ends_are_the_files_own(newline: str, tmp_path: Path) -> None:
    source = f'"""Doc."""\n{IMPORT}x = 1\n'.replace("\n", newline)
    after = guarded(tmp_path / "m.py", source.encode()).decode()
    lines = after.split(newline)
    assert "\n" not in "".join(lines)
    assert "\r" not in "".join(lines)
    assert lines[0] == '"""Doc."""'
    assert lines[-3:] == [IMPORT.rstrip(), "x = 1", ""]


@pytest.mark.parametrize(
    ("mark", "declared", "encoding"),
    [(b"\xef\xbb\xbf", "", "utf-8"), (b"", "# -*- coding: latin-1 -*-\n", "latin-1"), (b"", "", "utf-8")],
)
def test_the_encoding_is_the_files_own(mark: bytes, declared: str, encoding: str, tmp_path: Path) -> None:
    source = mark + f"{declared}name = 'é'; {IMPORT}".encode(encoding)
    after = guarded(tmp_path / "m.py", source)
    assert after.startswith(mark + declared.encode())
    assert after.endswith(f"name = 'é'; {IMPORT}".encode(encoding))
    assert after != source


@given(
    st.lists(st.sampled_from(sorted(HEADS)), max_size=3),
    st.lists(st.sampled_from(["x = 1\n", "\n", "# note\n", "def h(): return 2\n"]), max_size=4),
    st.sampled_from(sorted(IMPORTS)),
)
def test_the_guards_are_all_that_is_added(heads: list[str], body: list[str], kind: str) -> None:
    import ast
    import tempfile

    source = "".join(HEADS[head] for head in heads[:1]) + IMPORTS["plain"] + "".join(body) + IMPORTS[kind]
    with tempfile.TemporaryDirectory() as directory:
        after = guarded(Path(directory, "m.py"), source.encode()).decode()
    was, now = ast.parse(source), ast.parse(after)
    added = len(now.body) - len(was.body)
    assert added == 3
    kept = [ast.dump(s) for s in now.body]
    first = next(i for i, s in enumerate(now.body) if isinstance(s, ast.Import) and s.names[0].asname is not None)
    assert kept[:first] + kept[first + 3 :] == [ast.dump(s) for s in was.body]
    assert ast.get_docstring(now) == ast.get_docstring(was)
    assert SYMBOL in ast.dump(now.body[first + 1])


def test_the_table_is_the_documented_one() -> None:
    assert _REMOVED_TRANSFORMERS_SYMBOLS == {SYMBOL: ("transformers.generation.utils", "{}")}


def test_what_cannot_be_read_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "folder.py").mkdir()
    for name in ("absent.py", "folder.py", "absent/nested.py"):
        _apply_transformers_compat_guards(str(tmp_path / name))
    assert [path.name for path in tmp_path.iterdir()] == ["folder.py"]
