"""Torch's own Hugging Face storage classes and DCP directories: they read ours, we read theirs, to the bit.

What torch 2.13 cannot do and is left out where it writes: several regions of one tensor on a rank (its hooks describe
a packed shard as one chunk), complex numbers, and tensors without elements.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from tests.engine.bags import GRID, LINE, Bag
from tests.engine.setups import build, checkpointer, fsdp, fsdp_over_tp, plain, tensor_parallel
from tests.support.ranks import failure, run
from tests.support.simulate import Spread, raw, values
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter

from shardwise.errors import MisuseError, UnsafePickleError
from shardwise.plan.placement import Strided


def torch_can(spreads: tuple[Spread, ...], *, consolidate: bool = False) -> tuple[Spread, ...]:
    """The tensors that torch's classes handle."""
    return tuple(
        s
        for s in spreads
        if s.spec.name not in ("fused", "fused_columns", "nothing", "complex")
        # Its consolidation fails on integers and bools (pytorch#192485) and writes zero for a 0-dimensional tensor.
        and not (consolidate and (s.spec.dtype in ("I64", "BOOL", "U8", "I8") or s.spec.name == "scalar"))
    )


def state(model: Bag) -> dict[str, torch.Tensor]:
    return dict(model.state_dict())


def save_ours(root: Path, grid: bool, mode: str) -> None:
    with checkpointer(root, save_consolidated=mode) as engine:
        engine.save_model(Bag(torch_can(GRID if grid else LINE), filled=True), root)


def load_theirs(path: Path, grid: bool) -> list[str]:
    model = Bag(torch_can(GRID if grid else LINE), filled=False)
    tensors = state(model)
    dcp.load(tensors, storage_reader=HuggingFaceStorageReader(str(path)))
    model.load_state_dict(tensors)
    return model.wrong()


@pytest.mark.parametrize(("writers", "readers"), [(4, 3), (3, 4), (1, 2), (2, 1)])
@pytest.mark.parametrize("mode", ["false", "every"])
def test_torch_reads_our_shards_and_our_export(tmp_path: Path, writers: int, readers: int, mode: str) -> None:
    run(writers, save_ours, tmp_path, writers == 4, mode)
    path = tmp_path / "model" / ("consolidated" if mode == "every" else "")
    assert run(readers, load_theirs, path, readers == 4) == [[]] * readers


def save_theirs(path: Path, grid: bool, kind: str) -> None:
    model = Bag(torch_can(GRID if grid else LINE, consolidate=kind == "consolidated"), filled=True)
    writer = HuggingFaceStorageWriter(
        str(path), save_distributed=kind != "rank 0", enable_consolidation=kind == "consolidated"
    )
    if kind == "rank 0":
        whole = {spread.spec.name: values(spread.spec, number) for number, spread in enumerate(model.spreads)}
        if dist.get_rank() == 0:
            dcp.save(whole, storage_writer=writer, no_dist=True)
        dist.barrier()
    else:
        dcp.save(state(model), storage_writer=writer)


def load_ours(path: Path, grid: bool, consolidated: bool) -> list[str]:
    model = Bag(torch_can(GRID if grid else LINE, consolidate=consolidated), filled=False)
    with checkpointer(path) as engine:
        engine.load_model(model, path)
    return model.wrong()


@pytest.mark.parametrize(("writers", "readers"), [(4, 3), (3, 4), (1, 2), (2, 1)])
@pytest.mark.parametrize("kind", ["distributed", "consolidated", "rank 0"])
def test_we_read_what_torch_wrote(tmp_path: Path, writers: int, readers: int, kind: str) -> None:
    path = tmp_path / "theirs"
    run(writers, save_theirs, path, writers == 4, kind)
    assert run(readers, load_ours, path, readers == 4, kind == "consolidated") == [[]] * readers


def save_distcp(path: Path, grid: bool) -> None:
    dcp.save(state(Bag(torch_can(GRID if grid else LINE), filled=True)), checkpoint_id=str(path))


@pytest.mark.parametrize(("writers", "readers"), [(4, 3), (3, 4), (1, 2), (2, 1)])
def test_we_read_a_dcp_directory_of_others(tmp_path: Path, writers: int, readers: int) -> None:
    path = tmp_path / "dcp"
    run(writers, save_distcp, path, writers == 4)
    assert run(readers, load_ours, path, readers == 4, False) == [[]] * readers


def save_torch_format(root: Path) -> object:
    training = build(fsdp_over_tp, seed=0)
    training.step()
    with checkpointer(root, model_save_format="torch_save", save_consolidated="false") as engine:
        engine.save(0, 1, training.model, training.optimizer, training.scheduler)
    return training.digests(), training.options()


def load_torch_format(root: Path, tensor_parallel_model: bool) -> object:
    training = build(tensor_parallel if tensor_parallel_model else fsdp, seed=1)
    with checkpointer(root) as engine:
        engine.restore(training.model, training.optimizer, training.scheduler)
    return training.digests(), training.options()


def dcp_reads(root: Path) -> bool:
    """DCP itself opens what we wrote in its format."""
    training, other = build(plain, seed=1), build(plain, seed=1)
    tensors = {name: t for name, t in training.model.state_dict().items() if name != "head.weight"}
    dcp.load(tensors, checkpoint_id=str(root / "epoch_0_step_1" / "model"))
    with checkpointer(root) as engine:
        engine.restore(other.model)
    want = other.model.state_dict()
    return all(raw(tensor) == raw(want[name]) for name, tensor in tensors.items())


@pytest.mark.parametrize("writers", [1, 4])
def test_the_torch_save_format_goes_round(tmp_path: Path, writers: int) -> None:
    saved = run(writers, save_torch_format, tmp_path)[0]
    assert list((tmp_path / "epoch_0_step_1" / "model").glob("*.distcp"))
    assert not list((tmp_path / "epoch_0_step_1").rglob("*model*.safetensors"))
    for readers in (1, 2, 3):
        assert run(readers, load_torch_format, tmp_path, readers == 2) == [saved] * readers
    assert run(2, dcp_reads, tmp_path) == [True, True]


def save_packed(root: Path) -> None:
    spreads = tuple(s for s in LINE if s.spec.name == "fused")
    assert isinstance(spreads[0].placements[0], Strided)  # type: ignore[index]
    with checkpointer(root, model_save_format="torch_save") as engine:
        engine.save(0, 0, Bag(spreads, filled=True))


def test_what_dcp_would_record_wrongly_is_refused(tmp_path: Path) -> None:
    error = failure(2, save_packed, tmp_path)
    assert isinstance(error, MisuseError)
    assert error.tensor == "fused"
    assert "safetensors" in str(error)
    assert not list(tmp_path.glob("epoch*"))


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return eval, ("1",)


def save_evil(path: Path) -> None:
    dcp.save({"w": torch.zeros(3), "evil": torch.zeros(1)}, checkpoint_id=str(path))
    if dist.get_rank() == 0:
        import pickle

        (path / ".metadata").write_bytes(pickle.dumps(Evil()))


def load_evil(path: Path) -> None:
    with checkpointer(path) as engine:
        engine.load_model(torch.nn.Linear(2, 2), path)


def test_dcp_metadata_that_names_other_classes_is_refused(tmp_path: Path) -> None:
    run(2, save_evil, tmp_path / "evil")
    error = failure(2, load_evil, tmp_path / "evil")
    assert isinstance(error, UnsafePickleError)
    assert "eval" in str(error)
