"""What was written, as anybody reads it."""

from __future__ import annotations

import hashlib
from pathlib import Path

from safetensors import safe_open


def consolidated(root: Path) -> Path:
    """The export of the only checkpoint below ``root``."""
    [step] = root.glob("epoch_*")
    return step / "model" / "consolidated"


def export(root: Path) -> dict[str, str]:
    """Digests of the export's files, by name."""
    files = [path for path in consolidated(root).iterdir() if "safetensors" in path.name]
    assert files
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def tensors(directory: Path) -> dict[str, bytes]:
    """The tensors of a directory's safetensors files."""
    out: dict[str, bytes] = {}
    for path in directory.glob("*.safetensors"):
        with safe_open(path, framework="np") as file:
            out |= {name: file.get_tensor(name).tobytes() for name in file.keys()}  # noqa: SIM118
    return out
