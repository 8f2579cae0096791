"""Damaged checkpoints and places that cannot be written: one typed error on every rank, nothing published touched."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from tests.engine.setups import Digests, Run, build, fsdp
from tests.support.faults import FaultyStorage, is_tensor_data
from tests.support.ranks import failure, run

from shardwise import Checkpointer, CheckpointingConfig
from shardwise.disk.storage import Storage
from shardwise.errors import (
    CheckpointNotFoundError,
    DtypeMismatchError,
    HeaderError,
    IncompleteCheckpointError,
    IntegrityError,
    MissingTensorError,
    ShapeMismatchError,
    ShardwiseError,
    StateFormatError,
    StorageError,
    UnexpectedTensorError,
    WeightIndexError,
)
from shardwise.lifecycle import resolve


def engine(root: Path, storage: Storage | None = None, **settings: object) -> Checkpointer:
    config = CheckpointingConfig(checkpoint_dir=root, **settings)  # type: ignore[arg-type]
    return Checkpointer(config, dist.get_rank(), 0, 0, storage=storage)


def save(root: Path, mode: str, step: int = 1) -> Digests:
    training = build(fsdp, seed=0)
    training.step()
    with engine(root, save_consolidated=mode, max_file_bytes=6000) as made:
        made.save(0, step, training.model, training.optimizer)
    return training.digests()


def load(root: Path) -> None:
    training = build(fsdp, seed=1)
    training.step()
    before = training.digests()
    with engine(root) as made:
        try:
            made.load_model(training.model, root / "epoch_0_step_1" / "model")
        except (MissingTensorError, UnexpectedTensorError, ShapeMismatchError, DtypeMismatchError):
            # Nothing was written before everything was compared.
            assert training.digests() == before
            raise


def load_optimizer(root: Path) -> None:
    training = build(fsdp, seed=1)
    with engine(root) as made:
        made.load_optimizer(training.optimizer, training.model, root / "epoch_0_step_1")


def restore(root: Path) -> None:
    training = build(fsdp, seed=1)
    with engine(root) as made:
        made.restore(training.model, training.optimizer)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("good")
    for mode in ("every", "false"):
        run(2, save, root / mode, mode)
    return root


@pytest.fixture
def copy(good: Path, tmp_path: Path) -> Callable[[str], Path]:
    """A checkpoint of a mode that may be damaged."""

    def make(mode: str) -> Path:
        shutil.copytree(good / mode, tmp_path / mode, symlinks=True)
        return tmp_path / mode

    return make


def file_of(directory: Path, tensor: str) -> Path:
    return next(f for f in sorted(directory.glob("*.safetensors")) if tensor in load_file(f))


def consolidated(root: Path) -> Path:
    return root / "epoch_0_step_1" / "model" / "consolidated"


def change(file: Path, name: str, how: Callable[[torch.Tensor], torch.Tensor | None], new: str | None = None) -> None:
    """Rewrite a file with one tensor changed, dropped or renamed; the index is removed, as it would be wrong."""
    tensors = load_file(file)
    made = how(tensors.pop(name))
    if made is not None:
        tensors[new or name] = made.contiguous()
    save_file(tensors, file, {"format": "pt"})
    for index in file.parent.glob("*.index.json"):
        index.unlink()


def test_a_missing_file_that_the_index_names(copy: Callable[[str], Path]) -> None:
    root = copy("every")
    gone = file_of(consolidated(root), "up.weight")
    held = load_file(gone).keys()
    gone.unlink()
    error = failure(3, load, root)
    assert isinstance(error, WeightIndexError)
    assert gone.name in str(error)
    assert error.tensor in held
    assert "restore" in str(error)


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("manifest", [True, False])
def test_a_missing_shard(copy: Callable[[str], Path], number: int, manifest: bool) -> None:
    root = copy("false")
    gone = next((root / "epoch_0_step_1" / "model").glob(f"shard-0000{number}-*"))
    gone.unlink()
    if not manifest:
        (root / "epoch_0_step_1" / "manifest.json").unlink()
    error = failure(3, load, root)
    assert error.tensor is not None
    assert str(root) in str(error)
    if manifest:
        assert isinstance(error, CheckpointNotFoundError)
        assert error.path == str(gone)
    else:
        assert isinstance(error, MissingTensorError | ShapeMismatchError)
        assert "missing" in str(error)


@pytest.mark.parametrize("left", [0, 5, 300, -1])
@pytest.mark.parametrize("mode", ["every", "false"])
def test_a_truncated_file(copy: Callable[[str], Path], mode: str, left: int) -> None:
    root = copy(mode)
    file = max((root / "epoch_0_step_1" / "model").rglob("*.safetensors"), key=lambda f: f.stat().st_size)
    os.truncate(file, file.stat().st_size + left if left < 0 else left)
    error = failure(3, load, root)
    assert isinstance(error, HeaderError)
    assert error.path == str(file)


@pytest.mark.parametrize("mode", ["every", "false"])
def test_a_truncated_file_is_found_before_anything_is_restored(copy: Callable[[str], Path], mode: str) -> None:
    root = copy(mode)
    file = max((root / "epoch_0_step_1" / "model").rglob("*.safetensors"), key=lambda f: f.stat().st_size)
    os.truncate(file, file.stat().st_size - 1)
    error = failure(3, restore, root)
    assert isinstance(error, IntegrityError | HeaderError)
    assert file.name in str(error)


def test_a_file_that_is_cut_while_it_is_read(good: Path) -> None:
    error = failure(2, load_cut, good / "every")
    assert isinstance(error, IntegrityError)
    assert error.tensor is not None
    assert error.path is not None
    assert error.rank == 1


class CutStorage(FaultyStorage):
    """A file that ends early, on one rank."""

    def read(self, handle: int, into: memoryview, offset: int) -> int:
        got = super().read(handle, into, offset)
        return got - 1 if got and dist.get_rank() == 1 and is_tensor_data(self.paths[handle], offset) else got


def load_cut(root: Path) -> None:
    with engine(root, CutStorage("none", 0)) as made:
        made.restore(build(fsdp, seed=1).model)


def load_broken_device(root: Path) -> None:
    with engine(root, FaultyStorage("read", 1, errno.EIO, 3)) as made:
        made.restore(build(fsdp, seed=1).model)


def test_a_device_that_fails_while_it_is_read(good: Path) -> None:
    error = failure(2, load_broken_device, good / "false")
    assert isinstance(error, StorageError)
    assert (error.errno, error.rank) == (errno.EIO, 1)
    assert error.tensor is not None
    assert str(good) in str(error)


def test_a_shape_that_differs(copy: Callable[[str], Path]) -> None:
    root = copy("every")
    file = file_of(consolidated(root), "odd.weight")
    change(file, "odd.weight", lambda t: t[:-1])
    error = failure(2, load, root)
    assert isinstance(error, ShapeMismatchError)
    assert (error.tensor, error.path) == ("odd.weight", str(file))
    assert "[13, 24]" in str(error)
    assert "[12, 24]" in str(error)
    assert "missing" not in str(error)


def test_a_dtype_that_differs(copy: Callable[[str], Path]) -> None:
    root = copy("every")
    file = file_of(consolidated(root), "odd.weight")
    change(file, "odd.weight", lambda t: t.to(torch.float16))
    error = failure(3, load, root)
    assert isinstance(error, DtypeMismatchError)
    assert (error.tensor, error.path) == ("odd.weight", str(file))
    assert "F16" in str(error)


def test_a_name_that_the_file_lacks(copy: Callable[[str], Path]) -> None:
    root = copy("every")
    change(file_of(consolidated(root), "odd.weight"), "odd.weight", lambda t: t, "oddd.weight")
    error = failure(2, load, root)
    assert isinstance(error, MissingTensorError)
    assert isinstance(error, KeyError)
    assert error.tensor == "odd.weight"
    assert "'oddd.weight'" in str(error)
    assert str(root) in str(error)


def test_a_name_that_the_model_lacks(copy: Callable[[str], Path]) -> None:
    root = copy("every")
    file = file_of(consolidated(root), "odd.weight")
    tensors = load_file(file)
    save_file(tensors | {"odd.wait": torch.zeros(3)}, file, {"format": "pt"})
    error = failure(2, load, root)
    assert isinstance(error, UnexpectedTensorError)
    assert error.tensor == "odd.wait"
    assert "'odd.weight', which the checkpoint has too" in str(error)


@pytest.mark.parametrize("content", [b"", b"{", b'{"version": 9}', b"[1]"])
def test_damaged_optimizer_groups(copy: Callable[[str], Path], content: bytes) -> None:
    root = copy("every")
    (root / "epoch_0_step_1" / "optim" / "optimizer.json").write_bytes(content)
    error = failure(2, load_optimizer, root)
    assert isinstance(error, StateFormatError)
    assert "optimizer.json" in str(error)


def test_a_missing_optimizer(copy: Callable[[str], Path]) -> None:
    root = copy("every")
    shutil.rmtree(root / "epoch_0_step_1" / "optim")
    error = failure(2, load_optimizer, root)
    assert isinstance(error, CheckpointNotFoundError)
    assert error.path == str(root / "epoch_0_step_1" / "optim")
    assert "without an optimizer" in str(error)


def load_from(root: Path, where: str) -> None:
    with engine(root) as made:
        made.restore(build(fsdp, seed=1).model, restore_from=where)


@pytest.mark.parametrize("where", ["epoch_9_step_9", "/no/such/directory", "LOWEST"])
def test_what_does_not_exist(good: Path, where: str) -> None:
    error = failure(2, load_from, good / "every", where)
    assert isinstance(error, CheckpointNotFoundError)
    assert where in str(error)


def test_an_interrupted_save_named_explicitly(good: Path, tmp_path: Path) -> None:
    shutil.copytree(good / "every", tmp_path / "root", symlinks=True)
    (tmp_path / "root" / ".saving-epoch_0_step_2" / "model").mkdir(parents=True)
    for where in (".saving-epoch_0_step_2", str(tmp_path / "root" / ".saving-epoch_0_step_2")):
        error = failure(2, load_from, tmp_path / "root", where)
        assert isinstance(error, IncompleteCheckpointError | CheckpointNotFoundError)


# --- places that cannot be written ----------------------------------------------------------------------------------


def save_second(
    root: Path,
    storages: list[Storage | None],
    first: int = 2,
    **settings: object,
) -> list[dict[str, str | int | None]]:
    """Try to save with each storage; return the errors."""
    training = build(fsdp, seed=0)
    training.step()
    return save_again(training, root, storages, first, **settings)


def save_again(
    training: Run,
    root: Path,
    storages: list[Storage | None],
    first: int,
    **settings: object,
) -> list[dict[str, str | int | None]]:
    errors = []
    for number, storage in enumerate(storages):
        try:
            made = engine(root, storage, **settings)
        except ShardwiseError as error:
            errors.append(error.to_record())
            continue
        try:
            made.save(0, first + number, training.model, training.optimizer)
        except ShardwiseError as error:
            errors.append(error.to_record())
        made.close()
    return errors


def settled(root: Path) -> None:
    """What was published before is as it was, and nothing else is there."""
    found = resolve(root, "LATEST")
    assert found is not None
    assert found.name == "epoch_0_step_1"
    assert not [p.name for p in root.iterdir() if p.name.startswith((".saving", "epoch_0_step_2"))]


OPERATIONS = ("make_directory", "check_space", "create", "open", "write", "sync", "close", "sync_directory")
SAVING: tuple[dict[str, object], ...] = (
    {"save_consolidated": "every"},
    {"save_consolidated": "false"},
    {"save_consolidated": "every", "random_writes": False},
)


def at_each_operation(root: Path, rank: int) -> dict[str, list[dict[str, str | int | None]]]:
    """Save in each way while each operation fails at its first or fourth call on ``rank``; errors by operation."""
    training = build(fsdp, seed=0)
    training.step()
    found: dict[str, list[dict[str, str | int | None]]] = {}
    for operation in OPERATIONS:
        found[operation] = []
        for number, mode in enumerate(SAVING):
            storages: list[Storage | None] = [FaultyStorage(operation, rank, nth=nth) for nth in (1, 4)]
            found[operation] += save_again(training, root, storages, 2 + 2 * number, **mode)
        dist.barrier()
        if dist.get_rank() == 0:
            # Whatever the rank does not do cannot fail; a save that succeeded is taken away again.
            assert not list(root.glob(".saving-*"))
            for step in range(2, 8):
                shutil.rmtree(root / f"epoch_0_step_{step}", ignore_errors=True)
            (root / "LATEST").unlink(missing_ok=True)
            (root / "LATEST").symlink_to("epoch_0_step_1")
        dist.barrier()
    return found


@pytest.mark.parametrize("rank", [0, 1])
def test_a_disk_that_fills_up_at_any_operation(good: Path, tmp_path: Path, rank: int) -> None:
    root = tmp_path / "root"
    shutil.copytree(good / "every", root, symlinks=True)
    before = sorted((p.name, p.stat().st_mtime_ns) for p in root.rglob("*"))
    found = run(2, at_each_operation, root, rank)
    assert found[0] == found[1], "the ranks disagree"
    for records in found[0].values():  # type: ignore[attr-defined]
        for record in records:
            error = ShardwiseError.from_record(record)
            assert isinstance(error, StorageError), error
            assert (error.errno, error.rank) == (errno.ENOSPC, rank)
            assert str(root) in str(error)
            assert "free space" in str(error)
    failed = {operation for operation, records in found[0].items() if records}  # type: ignore[attr-defined]
    assert {"create", "open", "write", "sync", "close"} <= failed
    after = {p.name: p.stat().st_mtime_ns for p in (root / "epoch_0_step_1").rglob("*") if p.is_file()}
    assert all(dict(before)[name] == time for name, time in after.items())


def test_a_file_system_that_refuses_to_publish(good: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    shutil.copytree(good / "every", root, symlinks=True)
    storages = [FaultyStorage(op, 0, errno.EROFS) for op in ("make_directory", "sync_directory", "rename_new")]
    found = run(2, save_second, root, storages)
    assert found[0] == found[1]
    assert len(found[0]) == len(storages)  # type: ignore[arg-type]
    for record in found[0]:  # type: ignore[attr-defined]
        error = ShardwiseError.from_record(record)
        assert isinstance(error, StorageError)
        assert error.errno == errno.EROFS
        assert str(root) in str(error)
    settled(root)
    assert run(2, save_second, root, [None]) == [[], []]
    assert (root / "LATEST").resolve().name == "epoch_0_step_2"


@pytest.mark.parametrize("below", ["", "sub/dir"])
def test_a_directory_that_is_a_file(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").write_text("precious")
    records = run(2, save_second, tmp_path / "file" / below, [None])
    assert records[0] == records[1]
    error = ShardwiseError.from_record(records[0][0])  # type: ignore[index]
    assert isinstance(error, StorageError)
    assert error.errno in (errno.ENOTDIR, errno.EEXIST)
    assert str(tmp_path / "file") in str(error)
    assert (tmp_path / "file").read_text() == "precious"


def save_component(path: Path) -> None:
    training = build(fsdp, seed=0)
    with engine(path) as made:
        made.save_model(training.model, path)


def test_a_component_below_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    error = failure(2, save_component, tmp_path / "file")
    assert isinstance(error, StorageError)
    assert str(tmp_path / "file") in str(error)


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 1 MiB."""
    place = tmp_path / "small"
    place.mkdir()
    options = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)]
    if os.geteuid() != 0 or subprocess.run(options, check=False, capture_output=True).returncode:
        pytest.skip("mounting is not permitted here")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.mark.parametrize("mode", ["every", "false"])
def test_a_full_disk(small: Path, mode: str) -> None:
    run(2, save, small, mode)
    info = os.statvfs(small)
    (small / "ballast").write_bytes(bytes(info.f_bavail * info.f_frsize - 40_000))
    before = sorted(p.name for p in small.rglob("*"))
    error = ShardwiseError.from_record(run(2, save_second, small, [None])[0][0])  # type: ignore[index]
    assert isinstance(error, StorageError)
    assert error.errno == errno.ENOSPC
    assert "free space" in str(error)
    settled(small)
    assert sorted(p.name for p in small.rglob("*")) == before
    (small / "ballast").unlink()
    assert run(2, save_second, small, [None]) == [[], []]


def test_a_read_only_file_system(small: Path) -> None:
    run(2, save, small, "every")
    subprocess.run(["mount", "-o", "remount,ro", str(small)], check=True)
    error = ShardwiseError.from_record(run(2, save_second, small, [None])[1][0])  # type: ignore[index]
    assert isinstance(error, StorageError)
    assert error.errno == errno.EROFS
    assert "read-only" in str(error)
    settled(small)
    run(2, restore, small)


def save_with_limit(root: Path) -> list[dict[str, str | int | None]]:
    """The operating system itself refuses to write beyond a size, on one rank."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    if dist.get_rank() == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4000, before[1]))
    try:
        return save_second(root, [None])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, old)


def test_a_write_that_the_operating_system_refuses_half_way(good: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    shutil.copytree(good / "every", root, symlinks=True)
    found = run(2, save_with_limit, root)
    assert found[0] == found[1]
    error = ShardwiseError.from_record(found[0][0])  # type: ignore[index]
    assert isinstance(error, StorageError)
    assert (error.errno, error.rank) == (errno.EFBIG, 1)
    assert str(root) in str(error)
    settled(root)


@pytest.mark.parametrize("variant", ["ema", "fp16"])
def test_another_version_of_a_file_is_not_mixed_in(variant: str, tmp_path: Path) -> None:
    values = {"weight": torch.arange(6.0).view(2, 3), "bias": torch.ones(2)}
    save_file(values, tmp_path / "model.safetensors")
    dtype = torch.float16 if variant == "fp16" else torch.float32
    save_file({name: (-v).to(dtype) for name, v in values.items()}, tmp_path / f"model.{variant}.safetensors")
    model = torch.nn.Linear(3, 2)
    with CheckpointingConfig(checkpoint_dir=tmp_path / "x").build() as engine:
        engine.load_model(model, tmp_path)
    assert torch.equal(model.weight, values["weight"])
    assert torch.equal(model.bias, values["bias"])
