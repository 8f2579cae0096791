"""The table, the picture and the page that a run leaves in the documentation."""

from __future__ import annotations

import datetime
import html
import importlib.metadata
import math
import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.peers.turns import Cell, Line

_PACKAGES = ("torch", "nemo-automodel", "transformers", "accelerate", "torchtitan")


@dataclass(frozen=True)
class Conditions:
    """What the figures depend on."""

    machine: str
    versions: str
    size: float
    repeats: int
    load: float
    day: str


def conditions(size: float, repeats: int, directory: Path) -> Conditions:
    """Those of now, the machine in general terms."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return Conditions(
        f"{os.cpu_count()} cores ({_processor()}), {memory:.0f} GiB of memory, files on {_file_system(directory)}",
        ", ".join(f"{name} {_version(name)}" for name in _PACKAGES),
        size,
        repeats,
        os.getloadavg()[0],
        datetime.datetime.now(tz=datetime.UTC).strftime("%d %B %Y").lstrip("0"),
    )


def _processor() -> str:
    facts = dict[str, str]()
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        key, _, value = line.partition(":")
        facts.setdefault(key.strip(), value.strip())
    wide = "with AVX-512" if "avx512f" in facts.get("flags", "") else "without AVX-512"
    return f"{facts.get('model name', 'unknown')}, {wide}"


def _file_system(directory: Path) -> str:
    best = ("", "unknown")
    for line in Path("/proc/mounts").read_text(encoding="utf-8").splitlines():
        _, place, kind, *_ = line.split()
        if directory.resolve().is_relative_to(place) and len(place) >= len(best[0]):
            best = (place, kind)
    return best[1]


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _figure(cell: Cell) -> str:
    if cell.reason:
        return ("failed: " if cell.failed else "no: ") + cell.reason.replace("|", "/")
    if not cell.ratios:
        return ""
    return f"{cell.ratio:.2f} ({min(cell.ratios):.2f}-{max(cell.ratios):.2f}), {cell.peak_mib:.0f} MiB"


def table(lines: Sequence[Line]) -> str:
    """Operations across, peers down: ratio (smallest-largest), and the extra memory of the rank that took most."""
    head = ["", *(f"{line.name} (raw {statistics.median(line.raw_seconds or [math.nan]):.2f} s)" for line in lines)]
    rows = [head, ["---"] * len(head)]
    for number, first in enumerate(lines[0].cells):
        rows.append([first.peer, *(_figure(line.cells[number]) for line in lines)])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def write(docs: Path, run: Conditions, lines: Sequence[Line]) -> None:
    """Write ``peers.md`` and ``img/peers.svg``."""
    (docs / "img").mkdir(parents=True, exist_ok=True)
    (docs / "img" / "peers.svg").write_text(picture(lines), encoding="utf-8")
    (docs / "peers.md").write_text(_page(run, lines), encoding="utf-8")


def _page(run: Conditions, lines: Sequence[Line]) -> str:
    return f"""# Beside other libraries

Written by `make bench-peers` on {run.day}; not edited by hand.

Two processes (gloo) with one thread each, a Llama of transformers of {run.size:g} GB in bfloat16, sharded by FSDP2.
Machine: {run.machine}; load {run.load:.1f} when the run began. {run.versions}.

Each figure is the median of the ratios of {run.repeats} turns, after one that is not counted, to a raw write or read of
the same bytes in the same turn (smallest and largest in parentheses), then the growth of the memory of the rank that
grew most. **Less is better; 1 is what the machine does for bare bytes.**

{table(lines)}

![Ratios as bars on a logarithmic scale](img/peers.svg)

- **raw**: each rank writes its parameters' memory with large `pwrite` calls into a fresh file of its own, then `fsync`,
  after as much memory has been touched as the write will take; it reads with `preadv` into memory in use already, for
  base models into new memory. The stall is compared with the raw write.
- Each peer has processes of its own, which wait while others work, and turns begin with another peer each time.
- **What is checked**: after each save that all bytes are there; of each consolidated save's first turn every element of
  the files; after each load every element, in a model that was zeros before. During an asynchronous save the parameters
  are set to zero as soon as it says that training may go on, and what it wrote must be what they were.
- *Sharded* is what each library resumes from: torch, accelerate and torchtitan write DCP files, the others safetensors.
  shardwise's are digested; the others' are not.
- *Columns*: FSDP2 with `shard_placement_fn` along the last dimension. *Model and optimizer*: AdamW's moments in
  bfloat16 and a model of a third of the size, so that all lines move as many bytes.
- torch's writer splits into files of 450 MB and joins them with two threads. torchtitan's checkpointer is given the
  same transformers model and a conversion that changes no name. accelerate's FSDP2, which is meant for accelerators, is
  turned on by hand. nemo-automodel is installed without its dependencies, some of which need a GPU, beside a newer
  transformers than it asks for.
- Memory is resident memory: where a library maps a file, the pages that it read count, although the system can take
  them back.
"""


_COLOURS = ("#1b7f5c", "#76b900", "#ee4c2c", "#d9a400", "#b07d00", "#5b6ee1", "#7a4fbf")
_LEFT, _WIDTH, _BAR, _GAP = 190, 760, 15, 26


def picture(lines: Sequence[Line]) -> str:
    """Bars for each operation; the scale is logarithmic and begins at a tenth of the raw time."""
    ratios = [cell.ratio for line in lines for cell in line.cells if cell.ratios and not cell.reason]
    top = max(10.0, *ratios) if ratios else 10.0
    scale = (_WIDTH - _LEFT - 60) / math.log10(top / 0.1)

    def at(ratio: float) -> float:
        return _LEFT + scale * math.log10(max(ratio, 0.1) / 0.1)

    parts: list[str] = []
    y = 20.0
    for line in lines:
        parts.append(f'<text x="8" y="{y + 4:.0f}" class="head">{html.escape(line.name)}</text>')
        y += 12
        for number, cell in enumerate(line.cells):
            parts.append(f'<text x="{_LEFT - 8}" y="{y + 12:.0f}" class="end">{html.escape(cell.peer)}</text>')
            if cell.reason or not cell.ratios:
                parts.append(f'<text x="{_LEFT + 4}" y="{y + 12:.0f}" class="no">{_short(cell)}</text>')
            else:
                colour, end = _COLOURS[number % len(_COLOURS)], at(cell.ratio)
                parts.append(
                    f'<rect x="{_LEFT}" y="{y + 1:.0f}" width="{max(end - _LEFT, 1):.1f}" height="{_BAR - 3}" '
                    f'fill="{colour}"/><text x="{end + 5:.1f}" y="{y + 12:.0f}">{cell.ratio:.2f}</text>'
                )
            y += _BAR
        y += _GAP
    raw = at(1.0)
    parts.append(f'<path d="M{raw:.1f} 4V{y - _GAP:.0f}" class="raw"/>')
    style = (
        "text{font:12px sans-serif;fill:#444}.head{font-weight:bold}.end{text-anchor:end}"
        ".no{fill:#777;font-style:italic}.raw{stroke:#777;stroke-dasharray:4 3}"
        "@media(prefers-color-scheme:dark){text{fill:#ccc}.no{fill:#999}}"
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {y:.0f}" role="img">'
        f"<title>Times as ratios to a raw write or read (dashed: 1)</title><style>{style}</style>"
        + "".join(parts)
        + "</svg>\n"
    )


def _short(cell: Cell) -> str:
    text = ("failed: " if cell.failed else "") + cell.reason
    return html.escape(text if len(text) <= 80 else text[:79] + "…")
