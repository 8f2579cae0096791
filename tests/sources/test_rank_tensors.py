"""DTensors and tensors in files, form by form: those of earlier torch, and those that are refused.

The forms of earlier releases are written by hand, from their sources; none of these releases is installed here.
"""

from __future__ import annotations

import struct
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from tests.format.torch_files import named, pickled, tensor, write_archive

from shardwise.errors import FormatError, ShardwiseError, TensorError, UnsafePickleError
from shardwise.format.pickle_tree import PickledCall, PickledGlobal, PickledReference
from shardwise.format.torch_archive import read_torch_archive
from shardwise.geometry import Box
from shardwise.sources.others.distributed import RANK_ENUMS, RANK_NAMES, RankTensor, rank_tensor

ROWS = struct.pack("<4f", 1, 2, 3, 4)


def made(path: str, state: object, *args: object) -> PickledCall:
    return PickledCall(named(path), args, state)


ROW_BY_ROW = made("torch.distributed.tensor.placement_types.Shard", {"dim": 0})
LOCAL = tensor("0", (2, 2))


@dataclass(frozen=True)
class Form:
    """A DTensor of 4 by 2, of which rank 1 of 2 has the last two rows."""

    dtensor: str = "torch.distributed.tensor.DTensor"
    spec: str = "torch.distributed.tensor._dtensor_spec.DTensorSpec"
    meta: str = "torch.distributed.tensor._dtensor_spec.TensorMeta"
    placement: PickledCall = ROW_BY_ROW
    mesh: str = "torch.distributed.device_mesh.DeviceMesh"
    of_mesh: tuple[tuple[str, object], ...] = (
        ("_layout", made("torch.distributed._mesh_layout._MeshLayout", {"shape": (2,), "stride": (1,)})),
        ("_coordinate_on_dim", (1,)),
        ("_rank", 1),
    )
    of_spec: tuple[tuple[str, object], ...] = ()
    slots: bool = True
    local: PickledCall = LOCAL

    def value(self) -> PickledCall:
        size = PickledCall(named("torch.Size"), ((4, 2),))
        meta = PickledCall(named(self.meta), (size, (2, 1), named("torch.float32")))
        mesh = made(self.mesh, dict(self.of_mesh))
        spec = made(
            self.spec, {"mesh": mesh, "placements": (self.placement,), "tensor_meta": meta, **dict(self.of_spec)}
        )
        state = {"_local_tensor": self.local, "_spec": spec}
        layout = PickledCall(named("torch.serialization._get_layout"), ("torch.strided",))
        inner = (named(self.dtensor), named("torch.float32"), (4, 2), (2, 1), 0, layout, None, False)
        wrapper = named("torch._utils._rebuild_wrapper_subclass")
        args = (wrapper, named(self.dtensor), inner, (None, state) if self.slots else state)
        return PickledCall(named("torch._tensor._rebuild_from_type_v2"), args)


def read(path: Path, value: object, storages: dict[str, bytes] | None = None, **others: object) -> RankTensor | None:
    file = write_archive(path / "file.pt", {"w": value}, {"0": ROWS} if storages is None else storages, **others)  # type: ignore[arg-type]
    archive = read_torch_archive(file, RANK_NAMES, RANK_ENUMS)
    assert isinstance(archive.tree, dict)
    return rank_tensor(archive, archive.tree["w"], "w")


OLD = Form(
    dtensor="torch.distributed._tensor.api.DTensor",
    spec="torch.distributed._tensor.placement_types.DTensorSpec",
    meta="torch.distributed._tensor.placement_types.TensorMeta",
    placement=made("torch.distributed._tensor.placement_types.Shard", {"dim": 0}),
    mesh="torch.distributed._tensor.device_mesh.DeviceMesh",
    of_mesh=(("mesh", tensor("1", (2,))), ("_coordinate_on_dim", [1])),
    slots=False,
)
FORMS = {
    "torch 2.9": Form(),
    "torch 2.1": OLD,
    "torch 2.4": replace(OLD, of_mesh=(*OLD.of_mesh, ("_flatten_mesh_list", (3, 1)))),
    "torch 2.13": Form(
        of_mesh=(
            (
                "_layout",
                made(
                    "torch.distributed._mesh_layout._MeshLayout",
                    {"axes": (made("torch.distributed._mesh_layout._FlatLayout", {"shape": (2,), "stride": (1,)}),)},
                ),
            ),
            ("_coordinate_on_dim", (1,)),
            ("_rank", 1),
        ),
        of_spec=(
            ("shard_order", (PickledCall(named("torch.distributed.tensor._dtensor_spec.ShardOrderEntry"), (0, (0,))),)),
        ),
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_of_several_releases(form: str, tmp_path: Path) -> None:
    found = read(tmp_path, FORMS[form].value(), {"0": ROWS, "1": b"\0" * 8})
    assert found is not None
    assert (found.shape, found.dtype, found.kind) == ((4, 2), "F32", "DTensor")
    assert [part.region.box for part in found.parts] == [Box((2, 0), (2, 2))]
    assert found.rank == (None if form == "torch 2.1" else 1)
    stored = found.parts[0].stored
    with (tmp_path / "file.pt").open("rb") as file:
        file.seek(stored.offset)
        assert file.read(16) == ROWS


def _order(*dims: int) -> tuple[tuple[str, object], ...]:
    entry = PickledCall(named("torch.distributed.tensor._dtensor_spec.ShardOrderEntry"), (0, dims))
    return (("shard_order", (entry,)),)


REFUSED = {
    "a sum": (
        replace(Form(), placement=made("torch.distributed.tensor.placement_types.Partial", {"reduce_op": "sum"})),
        "a sum that has not been made yet",
    ),
    "another order": (replace(Form(), of_spec=_order(1, 0)), r"by the mesh's dimensions in the order \[1, 0\]"),
    "not in the mesh": (
        replace(Form(), of_mesh=(Form().of_mesh[0], ("_coordinate_on_dim", None))),
        "not part of the tensor's mesh",
    ),
    "outside of the mesh": (
        replace(Form(), of_mesh=(Form().of_mesh[0], ("_coordinate_on_dim", (2,)))),
        r"the coordinate \[2\] in a mesh of \[2\]",
    ),
    "a dimension that it does not have": (
        replace(Form(), placement=made("torch.distributed.tensor.placement_types.Shard", {"dim": 2})),
        "a dimension that it does not have",
    ),
    "endless groups": (
        replace(
            Form(),
            placement=made("torch.distributed.tensor.placement_types._StridedShard", {"dim": 0, "split_factor": 2**60}),
        ),
        "split factor is not from 1",
    ),
    "another local shape": (replace(Form(), local=tensor("0", (1, 2), numel=4)), "a local tensor of .1, 2."),
    "a class that is on the list, but no tensor's": (
        replace(Form(), dtensor="torch.Tensor"),
        "of the class torch.Tensor",
    ),
    "columns first": (replace(Form(), local=tensor("0", (2, 2), strides=(1, 2))), "and not row by row"),
    "beyond its storage": (replace(Form(), local=tensor("0", (2, 2), start=2, numel=4)), "lies outside of its storage"),
    "another storage size": (replace(Form(), local=tensor("0", (2, 2), numel=8)), "its storage has 8 elements"),
    "no such storage": (replace(Form(), local=tensor("7", (2, 2))), "the storage '7', which the file does not have"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused(what: str, tmp_path: Path) -> None:
    form, says = REFUSED[what]
    with pytest.raises((FormatError, TensorError), match=says) as caught:
        read(tmp_path, form.value())
    assert caught.value.tensor == "w"
    assert caught.value.path == str(tmp_path / "file.pt")


def test_a_parameter_is_what_it_is_made_of_and_no_tensor_is_passed_over(tmp_path: Path) -> None:
    parameter = named("torch._utils._rebuild_parameter")
    found = read(tmp_path, PickledCall(parameter, (Form().value(), True, {})))
    assert found is not None
    assert found.kind == "DTensor"
    with pytest.raises(FormatError, match="in a form that is not known"):
        read(tmp_path, PickledCall(parameter, (PickledCall(parameter, (Form().value(), True, {})), True, {})))
    assert read(tmp_path, PickledCall(named("torch.Size"), ((2,),))) is None


def test_a_class_that_is_not_on_the_list(tmp_path: Path) -> None:
    form = replace(Form(), dtensor="somewhere.QuantizedTensor")
    with pytest.raises(UnsafePickleError, match=r"somewhere\.QuantizedTensor"):
        read(tmp_path, form.value())


def test_conjugates_and_dtypes_that_files_do_not_have(tmp_path: Path) -> None:
    plain = tensor("0", (2, 2))
    with pytest.raises(FormatError, match="the conjugate or negative bit"):
        read(tmp_path, PickledCall(plain.function, (*plain.args, {"conj": True})))
    storage = PickledReference(("storage", PickledGlobal("torch.storage", "UntypedStorage"), "0", "cpu", 16))
    args = (storage, 0, (1,), (1,), False, {}, named("torch.complex128"))
    with pytest.raises(FormatError, match=r"torch\.complex128 cannot be stored"):
        read(tmp_path, PickledCall(named("torch._utils._rebuild_tensor_v3"), args))


@pytest.mark.parametrize(
    ("others", "says"),
    [
        ({"more": {"file/byteorder": b"big"}}, "another byte order"),
        ({"compression": zipfile.ZIP_DEFLATED}, "compressed entry"),
        ({"more": {"other/data.pkl": pickled({})}}, "2 entries that are called data.pkl"),
    ],
)
def test_archives_that_torch_does_not_write(others: dict[str, object], says: str, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=says):
        read(tmp_path, tensor("0", (2, 2)), {"0": ROWS * 20}, **others)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 nothing", pickled({}), b"{}"])
def test_what_is_no_archive(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "file.pt").write_bytes(content)
    with pytest.raises(FormatError, match="no zip archive of torch.save|no whole archive"):
        read_torch_archive(tmp_path / "file.pt", RANK_NAMES)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.uint16, torch.bool, torch.int64, torch.complex64])
def test_each_dtype_of_torch_itself(dtype: torch.dtype, tmp_path: Path) -> None:
    whole = torch.arange(6).to(dtype)
    torch.save({"w": whole[2:5]}, tmp_path / "file.pt")
    archive = read_torch_archive(tmp_path / "file.pt", RANK_NAMES)
    assert isinstance(archive.tree, dict)
    found = rank_tensor(archive, archive.tree["w"], "w")
    assert found is not None
    with (tmp_path / "file.pt").open("rb") as file:
        file.seek(found.parts[0].stored.offset)
        raw = file.read(3 * dtype.itemsize)
    assert raw == whole[2:5].contiguous().view(torch.uint8).numpy().tobytes()


def test_changed_bytes_end_in_typed_errors(tmp_path: Path) -> None:
    """Every other byte of a pickle, changed in one bit: an error of ours, or a value of the right form."""
    whole = pickled({"w": FORMS["torch 2.13"].value()})
    refused = 0
    for position in range(0, len(whole), 2):
        data = bytearray(whole)
        data[position] ^= 1 << position // 2 % 8
        file = write_archive(tmp_path / "file.pt", {}, {"0": ROWS}, more={"file/data.pkl": bytes(data)})
        try:
            archive = read_torch_archive(file, RANK_NAMES, RANK_ENUMS)
            if isinstance(archive.tree, dict):
                for name, value in archive.tree.items():
                    rank_tensor(archive, value, str(name))
        except ShardwiseError:
            refused += 1
    assert refused > len(whole) // 4
