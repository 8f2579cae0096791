"""What runs the documents' code would notice code that does not do what they say."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.docs.pages import blocks, run_page


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "empty"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def page(folder: Path, text: str) -> str:
    path = folder.parent / "page.md"
    path.write_text(text)
    return str(path)


def test_blocks_share_a_namespace_and_files_are_run(folder: Path) -> None:
    text = """
```python
x = 6
```

```python title="say.py"
print("said")
```

```sh
python say.py
```

```text
said
```

```python
print(x, "and what differs:", folder_is)
```
"""
    text = text.replace("folder_is", repr(str(folder))) + "\n```text\n6 and what differs: /...\n```\n"
    ran = run_page(page(folder, text), folder)
    assert [printed for _, printed in ran][1:] == ["said\n", f"6 and what differs: {folder}\n"]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("```python\nprint(1)\n```\n\n```text\n2\n```\n", "the page says"),
        ("```sh\nexit 3\n```\n", "exit code 3"),
        ("```\nwhat is this\n```\n", "nobody knows how to run"),
        ("    indented\n", "nobody knows how to run"),
        ("- in a list\n\n  ```rust\n  let x;\n  ```\n", "nobody knows how to run"),
    ],
)
def test_what_does_not_hold_is_an_error(text: str, why: str, folder: Path) -> None:
    with pytest.raises(AssertionError, match=why):
        run_page(page(folder, text), folder)


def test_only_the_block_behind_a_reason_is_left_out(folder: Path) -> None:
    text = "<!-- not run: it takes a day -->\n```sh\nsleep 86400\n```\n\n```sh\ntrue\n```\n"
    name = page(folder, text)
    assert [block.reason for block in blocks(name)] == ["it takes a day", ""]
    assert [block.text for block, _ in run_page(name, folder)] == ["true\n"]
