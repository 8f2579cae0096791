"""Models for pages: safetensors files of any size, whose data are holes, and hostile names."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shardwise.geometry import DTYPE_BYTES

#: Names that would do something if they ever were markup, or looked like something else than they are.
HOSTILE = (
    "</script><img src=x onerror='document.title=1'>.weight",
    "<!--<script>",
    "{{data}}.{{script}}",
    "a\u202etxt.weight",
    "__proto__",
    "&lt;b&gt;",
    "x" * 3000,
)


def write_model(file: Path, tensors: Sequence[tuple[str, str, tuple[int, ...]]]) -> None:
    """A safetensors file; its data are a hole, so that it may be of any size."""
    header, end = {}, 0
    for name, dtype, shape in tensors:
        begin, end = end, end + math.prod(shape) * DTYPE_BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        stream.truncate(8 + len(text) + end)


def data_of(page: Path) -> dict[str, Any]:
    """The data that a page holds."""
    text = page.read_text().split('<script type="application/json" id="data">')[1].split("</script>")[0]
    return dict(json.loads(text))
