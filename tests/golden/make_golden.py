"""Writes the golden files anew: the tensor files by safetensors itself, the index and the manifest by shardwise.

Run from the root of the repository: ``python tests/golden/make_golden.py``. Only a deliberate change of format may
change what it writes.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from tests.format.builders import aliased_manifest, sample_manifest

from shardwise.format.index import encode_index
from shardwise.format.manifest import encode_manifest

HERE = Path(__file__).resolve().parent


def tensors() -> dict[str, torch.Tensor]:
    values = torch.arange(6)
    plain = (
        *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32, torch.uint32, torch.int64),
        *(torch.uint64, torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64),
        *(torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz),
    )
    return {f"t.{str(dtype).removeprefix('torch.')}": values.to(dtype).reshape(2, 3) for dtype in plain}


def main() -> None:
    save_file(tensors(), HERE / "dtypes.safetensors", metadata={"format": "pt"})
    odd = {
        "": torch.tensor([1.0]),
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 3),
        "caf\u00e9/\u4e2d\u6587 \U0001f600": torch.tensor([1, 2], dtype=torch.int8),
        'quote " slash \\ line \n tab \t bell \x07 del \x7f': torch.tensor([True]),
        "z": torch.zeros(3, dtype=torch.bfloat16),
        "a": torch.zeros(3, dtype=torch.bfloat16),
        "a.10": torch.ones(1),
        "a.2": torch.ones(1),
    }
    save_file(odd, HERE / "names.safetensors")
    save_file({"w": torch.zeros(4, 2)}, HERE / "metadata.safetensors", metadata={'k\u2028"': "line\nNUL\0 \u4e2d"})
    save_file({}, HERE / "none.safetensors")
    (HERE / "model.safetensors.index.json").write_bytes(
        encode_index(
            {"b.weight": "model-00002-of-00002.safetensors", "a.w\u00e9": "model-00001-of-00002.safetensors"},
            1234,
            total_parameters=617,
        )
    )
    (HERE / "manifest.json").write_bytes(encode_manifest(sample_manifest()))
    (HERE / "manifest-aliases.json").write_bytes(encode_manifest(aliased_manifest()))


if __name__ == "__main__":
    main()
