"""What `consolidate` does on request, how it reads serialised tensors, and how much memory that takes."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.ops.damaged import describe, gpt2, save_dcp
from tests.support.peak import peak, reset_peak

from shardwise.cli import main
from shardwise.disk.storage import LocalStorage
from shardwise.errors import ConversionError, MisuseError, StorageError
from shardwise.ops.consolidate import consolidate
from shardwise.ops.verify import verify
from shardwise.sources.packed_items import PackedItems


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in sorted(directory.glob("*.safetensors")) for name, t in load_file(file).items()}


def test_a_dtype_for_floating_tensors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = gpt2(5).state_dict()
    source = save_dcp(dict(state) | {"count": torch.arange(3)}, tmp_path / "dcp")
    describe(source)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"dtype": "float32"}))
    output = tmp_path / "export"
    arguments = ["consolidate", str(source), "--output", str(output), "--dtype", "bfloat16", "--no-class-check"]
    assert main([*arguments, "--json"]) == 0
    printed = capsys.readouterr()
    found = tensors(output)
    assert torch.equal(found.pop("count"), torch.arange(3))
    assert all(torch.equal(tensor, state[name].to(torch.bfloat16)) for name, tensor in found.items())
    assert set(json.loads(printed.out)["recast"]) == set(found)
    assert "cast from float32 to bfloat16" in printed.err
    assert json.loads((output / "config.json").read_text())["dtype"] == "bfloat16"
    assert verify(output).status == "whole"


def test_a_value_that_the_dtype_does_not_hold(tmp_path: Path) -> None:
    state = {"fine": torch.tensor([1.0, torch.inf]), "large": torch.tensor([1.0, 1e6])}
    source = save_dcp(state, tmp_path / "dcp")
    with pytest.raises(ConversionError, match="too large for float16") as caught:
        consolidate(source, tmp_path / "export", dtype="float16")
    assert caught.value.tensor == "large"
    assert [path.name for path in tmp_path.iterdir()] == ["dcp"]
    assert len(consolidate(source, tmp_path / "export", dtype="bfloat16").recast) == 2


def test_no_dtype_for_a_quantized_model(tmp_path: Path) -> None:
    source = save_dcp({"weight": torch.ones(4, 4).to(torch.float8_e4m3fn), "scale": torch.ones(1)}, tmp_path / "dcp")
    with pytest.raises(MisuseError, match="quantized"):
        consolidate(source, tmp_path / "export", dtype="bfloat16")
    with pytest.raises(MisuseError, match="dtype is 'int8'"):
        consolidate(source, tmp_path / "export", dtype="int8")


def test_the_size_of_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = {f"layer.{number}": torch.randn(64, 64) for number in range(6)}
    source = save_dcp(state, tmp_path / "dcp")
    output = tmp_path / "export"
    assert main(["consolidate", str(source), "--output", str(output), "--max-file-size", "32KiB"]) == 0
    assert len(list(output.glob("model-0000?-of-00003.safetensors"))) == 3
    assert all(torch.equal(tensor, state[name]) for name, tensor in tensors(output).items())
    assert verify(output).status == "whole"
    with pytest.raises(SystemExit):
        main(["consolidate", str(source), "--max-file-size", "much"])
    assert "is no size" in capsys.readouterr().err


class Full(LocalStorage):
    """Has no room behind the first 100,000 bytes of a file."""

    def write(self, handle: int, data: bytes | bytearray | memoryview, offset: int) -> None:
        if offset > 100_000:
            raise StorageError.from_os(OSError(28, "No space left on device"))
        super().write(handle, data, offset)


def test_what_fails_in_a_thread_names_file_and_tensor_and_leaves_nothing(tmp_path: Path) -> None:
    source = save_dcp({f"layer.{number}": torch.randn(100, 100) for number in range(8)}, tmp_path / "dcp")
    with pytest.raises(StorageError, match=r"layer\.") as caught:
        consolidate(source, tmp_path / "export", storage=Full())
    assert caught.value.path is not None
    assert caught.value.path.endswith("model.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["dcp"]


def test_memory_does_not_grow_with_the_tensors(tmp_path: Path) -> None:
    """Each is one item of DCP's; loading one takes 128 MiB."""
    state = {name: torch.randn(64 * 2**20 // 4) for name in ("a", "b", "c", "d")}
    source = save_dcp(dict(state), tmp_path / "dcp")
    consolidate(save_dcp({"small": torch.ones(2)}, tmp_path / "first"), tmp_path / "imported")
    reset_peak()
    before = peak()
    consolidate(source, tmp_path / "export", dtype="bfloat16")
    assert peak() - before < 96 * 2**20
    found = tensors(tmp_path / "export")
    assert all(torch.equal(found[name], tensor.to(torch.bfloat16)) for name, tensor in state.items())


def archive(tensor: torch.Tensor) -> bytes:
    made = io.BytesIO()
    torch.save(tensor, made)
    return made.getvalue()


def place(items: PackedItems, raw: bytes, shape: tuple[int, ...], dtype: str) -> int | None:
    def fill(into: memoryview, at: int) -> None:
        into[:] = raw[at : at + len(into)]

    return items.find(fill, len(raw), shape, dtype)


def test_where_the_elements_of_an_archive_are() -> None:
    items = PackedItems()
    first, second = torch.randn(4, 6), torch.randn(4, 6)
    for tensor in (first, second):
        raw = archive(tensor)
        at = place(items, raw, (4, 6), "F32")
        assert at is not None
        assert raw[at : at + 96] == tensor.numpy().tobytes()
    assert place(items, archive(first.view(6, 4)), (6, 4), "F32") is not None


@pytest.mark.parametrize(
    ("tensor", "dtype"),
    [
        pytest.param(torch.randn(6, 4).T, "F32", id="in another order"),
        pytest.param(torch.randn(8, 6)[4:], "F32", id="a part of a storage"),
        pytest.param(torch.randn(4, 6), "I32", id="of another dtype"),
        pytest.param(torch.randn(6, 4), "F32", id="of another shape"),
        pytest.param(torch.randn(4, 6, dtype=torch.complex64).conj(), "C64", id="to be conjugated"),
    ],
)
def test_archives_that_have_to_be_loaded(tensor: torch.Tensor, dtype: str) -> None:
    items = PackedItems()
    assert place(items, archive(torch.randn(4, 6)), (4, 6), "F32") is not None
    assert place(items, archive(tensor), (4, 6), dtype) is None


def test_an_archive_that_is_cut_short() -> None:
    assert place(PackedItems(), archive(torch.randn(4, 6))[:-200], (4, 6), "F32") is None


def test_an_archive_of_the_other_byte_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Is loaded, which turns its elements; doing that without memory would end the process."""

    class Other:
        byteorder = "big"

    with monkeypatch.context() as changed:
        changed.setattr("torch.serialization.sys", Other)
        raw = archive(torch.randn(4, 6))
    assert place(PackedItems(), raw, (4, 6), "F32") is None
