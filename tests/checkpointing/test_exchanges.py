"""What a save exchanges between the ranks, and that each learns of what goes wrong on another wherever it does."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from tests.support.ranks import run
from torch import nn
from torch.distributed.fsdp import fully_shard
from transformers import PretrainedConfig

from shardwise import Checkpointer, CheckpointingConfig
from shardwise.addons import CheckpointAddon, ConsolidatedHFAddon, SaveHookArgs
from shardwise.disk.storage import LocalStorage
from shardwise.errors import StorageError
from shardwise.ops.verify import verify

if TYPE_CHECKING:
    from typing_extensions import Buffer

#: Collectives of a later save of an unchanged model, and somewhat more. Each costs every save of a large run.
MOST_COLLECTIVES = 11


def build(layers: int = 4, size: int = 6) -> nn.Module:
    torch.manual_seed(layers)
    return fully_shard(nn.Sequential(*[nn.Linear(size, size) for _ in range(layers)]))


def add_one(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.detach().add_(1)


def whole(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.full_tensor() for name, value in model.state_dict().items()}


def read(directory: Path, model: nn.Module) -> dict[str, torch.Tensor]:
    """What a new checkpointer reads of it, into the model, whose values are put back."""
    kept = {name: value.to_local().clone() for name, value in model.state_dict().items()}
    for value in model.state_dict().values():
        value.to_local().fill_(7)
    with Checkpointer(CheckpointingConfig(checkpoint_dir=directory), dist.get_rank(), 0, 0) as loader:
        loader.load_model(model, directory / "model")
    found = whole(model)
    for name, value in model.state_dict().items():
        value.to_local().copy_(kept[name])
    return found


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def counted(calls: list[str]) -> None:
    """Let torch's collectives be counted in this process."""

    def count(name: str) -> None:
        collective = getattr(dist, name)

        def counting(*args: object, **kwargs: object) -> object:
            calls.append(name)
            return collective(*args, **kwargs)

        setattr(dist, name, counting)

    for name in ("all_reduce", "all_gather", "broadcast", "send", "recv", "isend", "irecv", "barrier"):
        count(name)


def save_again(root: Path, mode: str, is_whole: bool) -> list[int]:
    calls: list[str] = []
    counted(calls)
    config = CheckpointingConfig(checkpoint_dir=root / "run", save_consolidated=mode)
    counts, model = [], build()
    with Checkpointer(config, dist.get_rank(), 0, 0) as checkpointer:
        for step in range(3):
            calls.clear()
            if is_whole:
                checkpointer.save(0, step, model)
            else:
                checkpointer.save_model(model, root)
            counts.append(len(calls))
            add_one(model)
    return counts


@pytest.mark.parametrize("mode", ["every", "false"])
@pytest.mark.parametrize("is_whole", [False, True])
def test_a_later_save_exchanges_little(tmp_path: Path, mode: str, is_whole: bool) -> None:
    for first, *later in run(2, save_again, tmp_path, mode, is_whole):
        # A whole checkpoint has the generators' states besides: three more.
        assert max(later) <= min(first, MOST_COLLECTIVES + 3 * is_whole)
        assert later[0] == later[1]


class Refusing(LocalStorage):
    """Refuses one operation on one rank, while it is told to."""

    def __init__(self, operation: str, name: str, rank: int) -> None:
        self._refused = (operation, name)
        self._rank = rank
        self.is_on = False

    def _look(self, operation: str, name: str = "") -> None:
        if self.is_on and dist.get_rank() == self._rank and (operation, name) == self._refused:
            raise StorageError(f"no {operation} here", path=Path("/far") / name)

    def make_directory(self, path: Path, *, new: bool = False) -> None:
        self._look("make_directory", path.name)
        super().make_directory(path, new=new)

    def check_space(self, path: Path, nbytes: int) -> None:
        self._look("check_space")
        super().check_space(path, nbytes)

    def create(self, path: Path, size: int, head: Buffer) -> None:
        self._look("create", path.name)
        super().create(path, size, head)

    def write(self, handle: int, data: Buffer, offset: int) -> None:
        self._look("write")
        super().write(handle, data, offset)

    def sync(self, handle: int) -> None:
        self._look("sync")
        super().sync(handle)

    def sync_directory(self, path: Path) -> None:
        self._look("sync_directory", path.name)
        super().sync_directory(path)


Refusal = tuple[str, str, str, int]
REFUSALS: list[Refusal] = [
    *[(mode, "make_directory", ".hf_metadata", 0) for mode in ("every", "false")],
    *[(mode, "check_space", "", 0) for mode in ("every", "false")],
    *[(mode, "write", "", rank) for mode in ("every", "false") for rank in (0, 1)],
    *[(mode, "sync", "", rank) for mode in ("every", "false") for rank in (0, 1)],
    *[(mode, "create", "manifest.json", 0) for mode in ("every", "false")],
    ("every", "create", "model.safetensors.index.json", 0),
    ("every", "sync_directory", "consolidated", 0),
    ("false", "create", "consolidate.sh", 0),
    ("false", "check_space", "", 1),
]


def refused(root: Path, refusals: list[Refusal]) -> None:
    model = build()
    for number, (mode, operation, name, rank) in enumerate(refusals):
        storage = Refusing(operation, name, rank)
        directory = root / str(number)
        config = CheckpointingConfig(checkpoint_dir=root, save_consolidated=mode, collective_timeout_seconds=15)
        with Checkpointer(config, dist.get_rank(), 0, 0, storage=storage) as checkpointer:
            checkpointer.save_model(model, directory)
            first = whole(model)
            add_one(model)
            storage.is_on = True
            with pytest.raises(StorageError, match=f"no {operation} here") as caught:
                checkpointer.save_model(model, directory)
            assert caught.value.rank == rank, refusals[number]
            assert same(read(directory, model), first), refusals[number]
            assert [path.name for path in directory.iterdir()] == ["model"], refusals[number]
            storage.is_on = False
            checkpointer.save_model(model, directory)
            assert same(read(directory, model), whole(model)), refusals[number]
            assert verify(directory / "model").status == "whole"


def test_what_one_rank_is_refused_fails_on_all_and_leaves_the_earlier_model(tmp_path: Path) -> None:
    run(2, refused, tmp_path, REFUSALS)


class Scarce(LocalStorage):
    """A device with as much space as the first save of all ranks takes, on which rank 0 looks last of all."""

    def check_space(self, path: Path, nbytes: int) -> None:
        if dist.get_rank() == 0:
            time.sleep(0.3)
            taken = sum(file.stat().st_size for file in path.glob("shard-*"))
            if taken:
                raise StorageError(f"{taken} bytes are taken, and {nbytes} more are asked for", path=path)
        super().check_space(path, nbytes)


def save_where_space_is_scarce(root: Path) -> None:
    model = build()
    config = CheckpointingConfig(checkpoint_dir=root, save_consolidated="false")
    with Checkpointer(config, dist.get_rank(), 0, 0, storage=Scarce()) as checkpointer:
        for step in range(2):
            checkpointer.save_model(model, root / str(step))


def test_rank_0_asks_for_all_ranks_space_before_any_has_taken_its_own(tmp_path: Path) -> None:
    run(2, save_where_space_is_scarce, tmp_path)


class Unlisted(nn.Linear):
    """A module that cannot be looked at while it does not want to be."""

    is_shy = False

    def modules(self):  # type: ignore[no-untyped-def]
        if self.is_shy:
            raise RuntimeError("no list of modules")
        return super().modules()


def grow(model: nn.Module, rank: int) -> None:
    """One rank's model gets a parameter more, which the others learn of later."""
    if dist.get_rank() == rank:
        model.more = nn.Parameter(torch.ones(3))


def save_after_failure(root: Path, change: str) -> None:
    """Rank 1 cannot be described once, when rank 0's model has changed as well; then both are saved."""
    model = Unlisted(4, 3)
    for parameter in model.parameters():
        parameter.detach().fill_(1)
    config = CheckpointingConfig(checkpoint_dir=root, save_consolidated="every", collective_timeout_seconds=15)
    with Checkpointer(config, dist.get_rank(), 0, 0) as checkpointer:
        checkpointer.save_model(model, root)
        if change == "0 first":
            grow(model, 0)
        Unlisted.is_shy = dist.get_rank() == 1
        # What is captured anew is looked at anew.
        model.bias.data = model.bias.data.clone()
        with pytest.raises(Exception, match="no list of modules"):
            checkpointer.save_model(model, root)
        Unlisted.is_shy = False
        grow(model, 1 if change == "0 first" else 0)
        grow(model, 0 if change == "0 first" else 1)
        checkpointer.save_model(model, root)
    saved = load_file(root / "model" / "consolidated" / "model.safetensors")
    assert sorted(saved) == ["bias", "more", "weight"]


@pytest.mark.parametrize("change", ["0 first", "both later"])
def test_what_was_agreed_on_before_a_failed_save_is_asked_again(tmp_path: Path, change: str) -> None:
    run(2, save_after_failure, tmp_path, change)


def moved(root: Path, mode: str) -> None:
    """Memory that is another, values that are others: what an earlier save prepared must not be written again."""
    net = nn.Linear(4, 3)
    config = CheckpointingConfig(checkpoint_dir=root, save_consolidated=mode)
    with Checkpointer(config, dist.get_rank(), 0, 0) as checkpointer:
        for number in range(3):
            net.weight.data = torch.full((3, 4), float(number))  # one tensor's memory moves, the other's values change
            net.bias.detach().fill_(number)
            checkpointer.save_model(net, root)
            net.bias.detach().fill_(-1)
            checkpointer.load_model(net, root / "model")
            assert torch.equal(net.bias, torch.full((3,), float(number)))
            assert torch.equal(net.weight, torch.full((3, 4), float(number)))
            assert verify(root / "model").status == "whole"


@pytest.mark.parametrize("mode", ["every", "false"])
def test_memory_that_moves_between_saves_is_found(tmp_path: Path, mode: str) -> None:
    run(2, moved, tmp_path, mode)


class Derived(ConsolidatedHFAddon):
    """A user's variant of the library's addon."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def pre_save(self, **kwargs: Unpack[SaveHookArgs]) -> None:
        super().pre_save(**kwargs)
        self.seen.append(Path(str(kwargs["hf_metadata_dir"])).name)

    def post_save(self, **kwargs: Unpack[SaveHookArgs]) -> None:
        self.seen.append("copied" if any(Path(str(kwargs["consolidated_path"])).glob("config.json")) else "not yet")
        super().post_save(**kwargs)


class Configured(nn.Linear):
    """A model with a configuration, which the addon writes."""

    def __init__(self) -> None:
        super().__init__(4, 3)
        self.config = PretrainedConfig()


def with_addons(root: Path, first: bool) -> list[str]:
    derived = Derived()
    addons: list[CheckpointAddon] = [ConsolidatedHFAddon(), derived] if first else [derived]
    config = CheckpointingConfig(checkpoint_dir=root, save_consolidated="every")
    torch.manual_seed(0)  # other tests may have left the ranks different generators
    with Checkpointer(config, dist.get_rank(), 0, 0, addons=addons) as checkpointer:
        checkpointer.save_model(Configured(), root)
    assert (root / "model" / "consolidated" / "config.json").is_file()
    return derived.seen


@pytest.mark.parametrize("first", [False, True])
def test_addons_behind_and_derived_from_the_librarys_have_their_hooks_called(tmp_path: Path, first: bool) -> None:
    seen, of_rank_1 = run(2, with_addons, tmp_path, first)
    # The one before has put its files in place by the time that the second hook of the next is called.
    assert seen == [".hf_metadata", "copied" if first else "not yet"]
    assert len(of_rank_1) == 2


def test_an_addon_that_was_given_a_hook_of_its_own_runs_it(tmp_path: Path) -> None:
    addon, seen = ConsolidatedHFAddon(), []
    addon.post_save = lambda **kwargs: seen.append(sorted(kwargs))  # type: ignore[method-assign]
    config = CheckpointingConfig(checkpoint_dir=str(tmp_path), save_consolidated="every")
    with Checkpointer(config, addons=[addon]) as checkpointer:
        checkpointer.save_model(nn.Linear(2, 2), tmp_path)
    assert len(seen) == 1
