"""Takes the tour's pictures: runs its page and draws what its commands print, as ``docs/img/tour-NAME.svg``.

python -m tools.screenshots
"""

from __future__ import annotations

import io
import os
import re
import tempfile
from pathlib import Path

from rich.console import Console
from rich.text import Text
from tests.docs.pages import ROOT, Block, run_page

#: Fonts that rich's pictures fetch from a content network, and white space at the ends of lines.
_NOT_WANTED = re.compile(r"@font-face \{.*?\}\s*|[ \t]+$", re.S | re.M)
#: Where the tour seems to take place.
_HOME = "/home/you/tour"
#: The commands of which there is a picture, by how they begin.
_SHOWN = ("python train.py", "torchrun", "shardwise inspect", "shardwise verify checkpoints/")


def picture(shots: list[tuple[Block, str]], folder: Path, title: str, columns: int = 110) -> str:
    """A terminal in which the blocks were typed."""
    console = Console(record=True, width=columns, file=io.StringIO(), force_terminal=True)
    for block, printed in shots:
        console.print(Text(f"$ {block.text.strip()}", style="bold"))
        console.print(Text(printed.rstrip().replace(str(folder), _HOME)))
    return _NOT_WANTED.sub("", console.export_svg(title=title, unique_id="tour"))


def main() -> None:
    """Run the tour and write its pictures."""
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory).resolve()
        os.chdir(folder)
        ran = [(block, printed) for block, printed in run_page("docs/tour.md", folder) if block.language == "sh"]
        train, resume, inspect, verify = (
            next(each for each in ran if each[0].text.startswith(text)) for text in _SHOWN
        )
        for name, shots in {"resume": [train, resume], "inspect": [inspect], "verify": [verify]}.items():
            path = ROOT / "docs" / "img" / f"tour-{name}.svg"
            path.write_text(picture(shots, folder, "tour"))
        os.chdir(ROOT)


if __name__ == "__main__":
    main()
