"""What the site's pages get from other files while mkdocs builds them: messages by type, how-tos, the changelog."""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import Files
from mkdocs.structure.pages import Page

_ROW = re.compile(r"\| (?P<situation>.+?) \| `(?P<error>\w+)` \| (?P<message>.+?) \| `[^`]+` \|")


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Complete the pages that are made of other files."""
    docs = Path(config.docs_dir)
    if page.file.src_uri == "changelog.md":
        return (docs.parent / "CHANGELOG.md").read_text().replace("](docs/", "](")
    if page.file.src_uri == "troubleshooting.md":
        return with_messages(markdown, (docs / "errors.md").read_text())
    if page.file.src_uri == "howto/index.md":
        return markdown + "".join(
            f"\n- [{title(docs / file.src_uri)}]({file.name}.md)"
            for file in sorted(files.documentation_pages(), key=lambda file: file.src_uri)
            if file.src_uri.startswith("howto/") and file.name != "index"
        )
    return markdown


def with_messages(markdown: str, table: str) -> str:
    """Put the rows of docs/errors.md below the heading of their error's type."""
    rows: dict[str, list[str]] = {}
    for row in map(_ROW.fullmatch, table.splitlines()):
        if row is not None:
            rows.setdefault(row["error"], []).append(f"    | {row['message']} | {row['situation']} |")
    first, *sections = re.split(r"(?m)^(?=## )", markdown)
    for number, section in enumerate(sections):
        found = rows.get(section.split()[1])
        if found:
            head = '??? note "Messages"\n\n    | message begins | when |\n    |---|---|\n'
            sections[number] = section.rstrip() + "\n\n" + head + "\n".join(found) + "\n\n"
    return "".join([first, *sections])


def title(page: Path) -> str:
    """A page's first heading."""
    found = re.search(r"(?m)^# (.+)$", page.read_text())
    return page.stem if found is None else found[1]
