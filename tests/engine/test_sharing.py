"""Real ranks that want the same bytes: each is read by one of them, and nobody can tell from the result."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from tests.base.support import CountingStorage, llama, llama_config, on_meta, two_by_two, whole_tensor
from tests.engine.setups import Digests, Spreader, build, ddp, fsdp_over_tp, hsdp, plain, tensor_parallel
from tests.support.faults import FaultyStorage
from tests.support.peak import peak, reset_peak
from tests.support.ranks import failure, run
from torch import nn
from transformers import LlamaForCausalLM

from shardwise import Checkpointer, CheckpointingConfig
from shardwise.disk.storage import Storage
from shardwise.errors import StorageError
from shardwise.format.header import read_header

Ranges = list[tuple[str, int, int]]


class LostStorage(CountingStorage):
    """One that cannot say where its files are on rank 1."""

    def is_remote(self, path: Path) -> bool:
        if dist.get_rank() == 1:
            raise StorageError("the mount is gone", path=path, hint="Mount it again.")
        return True


class FarStorage(CountingStorage):
    """A file system that says it is on another machine."""

    def is_remote(self, path: Path) -> bool:
        return True


def engine(root: Path, mode: str, storage: Storage | None = None, **settings: object) -> Checkpointer:
    config = CheckpointingConfig(checkpoint_dir=root, share_replica_reads=mode, **settings)  # type: ignore[arg-type]
    return Checkpointer(config, storage=storage)


@dataclass(frozen=True)
class Restored:
    """What one rank has after a restore, and the ranges of tensor data that it read."""

    digests: Digests
    ranges: Ranges


def save(spread: Spreader, root: Path) -> Digests:
    training = build(spread, seed=0)
    training.step()
    with engine(root, "never", save_consolidated="every") as made:
        made.save(0, 1, training.model, training.optimizer, training.scheduler)
    return training.digests()


def restore(spread: Spreader, root: Path, mode: str, far: bool = False) -> Restored:
    training = build(spread, seed=1)
    storage = FarStorage() if far else CountingStorage()
    with engine(root, mode, storage) as made:
        assert made.restore(training.model, training.optimizer, training.scheduler) is not None
    ranges = [(str(path), begin, end) for path, begin, end in storage.ranges]
    return Restored(training.digests(), ranges)


def reads_of(ranks: list[Restored]) -> dict[tuple[str, str], list[int]]:
    """For each tensor of each file: how often each of its bytes was read, smallest and largest."""
    found: dict[tuple[str, str], list[int]] = {}
    for path in {path for rank in ranks for path, _, _ in rank.ranges}:
        header = read_header(Path(path))
        counts = torch.zeros(Path(path).stat().st_size, dtype=torch.int32)
        for rank in ranks:
            for file, begin, end in rank.ranges:
                if file == path:
                    counts[begin:end] += 1
        for entry in header.entries:
            own = counts[header.data_start + entry.begin : header.data_start + entry.begin + entry.spec.nbytes]
            if own.numel():
                found[path, entry.spec.name] = [int(own.min()), int(own.max())]
    return found


@pytest.mark.parametrize(
    ("spread", "world"), [(plain, 2), (ddp, 2), (hsdp, 4), (fsdp_over_tp, 4), (tensor_parallel, 2)]
)
def test_each_byte_is_read_once_and_the_result_is_the_same(spread: Spreader, world: int, tmp_path: Path) -> None:
    saved = run(world, save, spread, tmp_path)[0]
    alone: list[Restored] = run(world, restore, spread, tmp_path, "never")  # type: ignore[assignment]
    shared: list[Restored] = run(world, restore, spread, tmp_path, "always")  # type: ignore[assignment]
    assert all(rank.digests == saved for rank in [*alone, *shared])
    once, often = reads_of(shared), reads_of(alone)
    assert once.keys() == often.keys()
    assert len(once) > 20
    # Columns are read together with the gaps between them, which are other ranks' columns.
    gapped = [name for _, name in once if spread in (fsdp_over_tp, tensor_parallel) and "down.weight" in name]
    assert {name: n for (_, name), n in once.items() if name not in gapped and n != [1, 1]} == {}
    assert sum(n == [world, world] for n in often.values()) > 5  # buffers at least are on every rank
    if spread in (plain, ddp, hsdp):
        totals = [sum(end - begin for _, begin, end in rank.ranges) for rank in shared]
        assert max(totals) - min(totals) <= 2 * 53 * 24 * 4 * len({path for _, path in once})


def test_it_depends_on_where_the_files_are(tmp_path: Path) -> None:
    run(2, save, plain, tmp_path)
    near: list[Restored] = run(2, restore, plain, tmp_path, "auto")  # type: ignore[assignment]
    far: list[Restored] = run(2, restore, plain, tmp_path, "auto", True)  # type: ignore[assignment]
    assert set(map(tuple, reads_of(near).values())) == {(2, 2)}
    assert set(map(tuple, reads_of(far).values())) == {(1, 1)}


def restore_lost(root: Path) -> None:
    training = build(plain, seed=1)
    with engine(root, "auto", LostStorage()) as made:
        made.restore(training.model, training.optimizer, training.scheduler)


def test_a_rank_that_cannot_tell_where_the_files_are_fails_on_all(tmp_path: Path) -> None:
    run(2, save, plain, tmp_path)
    error = failure(2, restore_lost, tmp_path)
    assert isinstance(error, StorageError)
    assert (error.rank, "the mount is gone" in str(error)) == (1, True)


def save_dcp(root: Path) -> Digests:
    training = build(hsdp, seed=0)
    training.step()
    with engine(root, "never", model_save_format="torch_save") as made:
        made.save(0, 1, training.model, training.optimizer, training.scheduler)
    return training.digests()


def restore_dcp(root: Path, mode: str) -> tuple[Digests, dict[tuple[str, int, int], int]]:
    found = restore(plain, root, mode)
    items: dict[tuple[str, int, int], int] = {}
    for item in found.ranges:
        items[item] = items.get(item, 0) + 1
    return found.digests, items


def test_items_of_dcp_are_loaded_by_one_replica(tmp_path: Path) -> None:
    saved = run(2, save_dcp, tmp_path)[0]
    often = run(2, restore_dcp, tmp_path, "never")
    once = run(2, restore_dcp, tmp_path, "always")
    assert all(digests == saved for digests, _ in [*once, *often])  # type: ignore[misc]
    assert often[0][1] == often[1][1]  # type: ignore[index]
    (_, first), (_, second) = once  # type: ignore[misc]
    assert not first.keys() & second.keys()
    assert first | second == often[0][1]  # type: ignore[index]
    assert len(first | second) > 50


# --- base models ----------------------------------------------------------------------------------------------------


def _base(base: str, directory: str, mode: str, how: str, dtype: torch.dtype) -> tuple[list[torch.Tensor], Ranges]:
    model = on_meta(LlamaForCausalLM, llama_config(), dtype)
    if how == "hsdp":
        two_by_two(model)
    storage = CountingStorage()
    with engine(Path(directory), mode, storage) as made:
        made.load_base_model(model, "cpu", None, base)
    return [whole_tensor(t).detach().clone() for t in model.state_dict().values()], [
        (str(path), begin, end) for path, begin, end in storage.ranges
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("how", "world"), [("plain", 2), ("hsdp", 4)])
def test_base_models(tmp_path: Path, how: str, world: int, dtype: torch.dtype) -> None:
    llama(3).save_pretrained(tmp_path / "base")
    args = (str(tmp_path / "base"), str(tmp_path))
    alone = run(world, _base, *args, "never", how, dtype)
    shared = run(world, _base, *args, "always", how, dtype)
    want = llama(3).state_dict().values()
    for tensors, _ in [*alone, *shared]:  # type: ignore[misc]
        assert all(torch.equal(a, b.to(dtype)) for a, b in zip(tensors, want, strict=True))
    counts = reads_of([Restored({}, ranges) for _, ranges in shared])  # type: ignore[misc]
    assert set(map(tuple, counts.values())) == {(1, 1)}


# --- size and failure -----------------------------------------------------------------------------------------------


class Big(nn.Module):
    """One tensor of 48 MiB in memory of another order, whose bytes cannot arrive in place, and some that can."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Parameter(torch.empty(1531, 1024))
        self.turned = nn.Parameter(torch.empty(6144, 2048).t())
        self.small = nn.ParameterList(torch.empty(7, 3) for _ in range(50))
        for number, parameter in enumerate(self.parameters()):
            torch.manual_seed(number)
            nn.init.normal_(parameter)


def _save_big(root: str) -> None:
    with engine(Path(root), "never", save_consolidated="every") as made:
        made.save_model(Big(), root)


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Where a `Big` model was saved."""
    root = str(tmp_path_factory.mktemp("big"))
    run(2, _save_big, root)
    return root


def _load_big(root: str, times: int) -> tuple[int, int]:
    model, expected = Big(), Big()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    storage = CountingStorage()
    with engine(Path(root), "always", storage) as made:
        for _ in range(times):
            reset_peak()
            before = peak()
            made.load_model(model, Path(root) / "model")
            grown = peak() - before
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected.parameters(), strict=True))
    return storage.nbytes, grown


def test_large_tensors_in_bounded_memory(big: str) -> None:
    nbytes = sum(p.nbytes for p in Big().parameters())
    found = run(2, _load_big, big, 2)
    assert sum(read for read, _ in found) == 2 * nbytes  # loaded twice, by one rank each time  # type: ignore[misc]
    for read, grown in found:  # type: ignore[misc]
        assert abs(read - nbytes) <= 2 * 4 * 2**20
        assert grown <= 32 * 2**20


def _load_failing(root: str, nth: int, rank: int) -> None:
    model = Big()
    storage = FaultyStorage("read", rank, nth=nth)
    with engine(Path(root), "always", storage) as made:
        made.load_model(model, Path(root) / "model")


@pytest.mark.parametrize("nth", [1, 3])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_cannot_read_fails_all_of_them(big: str, nth: int, rank: int) -> None:
    error = failure(2, _load_failing, big, nth, rank)
    assert isinstance(error, StorageError)
    assert error.rank == rank
    assert "No space left" in str(error)
    assert error.path is not None
    assert error.path.endswith(".safetensors")


def _uneven(root: str) -> int:
    """Ranks of two kinds, as pipeline stages are, share with nobody of another kind and still agree."""
    torch.manual_seed(dist.get_rank() // 2)
    own = nn.ModuleDict({str(dist.get_rank() // 2): nn.Linear(8, 8)})
    with engine(Path(root), "never", save_consolidated="every") as made:
        made.save_model(own, root)
    before = {k: v.clone() for k, v in own.state_dict().items()}
    with torch.no_grad():
        for parameter in own.parameters():
            parameter.zero_()
    storage = CountingStorage()
    with engine(Path(root), "always", storage) as made:
        made.load_model(own, Path(root) / "model")
    assert all(torch.equal(own.state_dict()[k], v) for k, v in before.items())
    return storage.nbytes


def test_stages_share_among_themselves(tmp_path: Path) -> None:
    found = run(4, _uneven, str(tmp_path))
    assert sum(found[:2]) == sum(found[2:]) == (64 + 8) * 4  # type: ignore[arg-type]
