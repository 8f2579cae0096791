"""Saves a module, restores it into a fresh one, and compares with what torch's own state dict does."""

from __future__ import annotations

import contextlib
import copy
import shutil
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from tests.zoo.rows import Right, Row, change
from torch import nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from shardwise import Checkpointer, CheckpointingConfig
from shardwise.errors import RemoteError, ShardwiseError

Mode = Mapping[str, object]
MODES: dict[str, Mode] = {
    "export": {"save_consolidated": "every"},
    "shards": {"save_consolidated": "false"},
    "torch_save": {"save_consolidated": "false", "model_save_format": "torch_save"},
    "export, async": {"save_consolidated": "every", "is_async": True},
    "shards, async": {"save_consolidated": "false", "is_async": True},
    "torch_save, async": {"save_consolidated": "false", "model_save_format": "torch_save", "is_async": True},
}


@dataclass(frozen=True, slots=True)
class Verdict:
    """What came of one row.

    Attributes:
        kind: "same"; "refused", by an error that names what it is about; "wrong"; "impossible", where torch cannot
            make or spread such a module.
        text: What was refused and why, or what was wrong.
    """

    kind: str
    text: str = ""

    def is_right(self, row: Row) -> bool:
        """Whether that is right for the row."""
        if self.kind == "same":
            return row.right is not Right.REFUSED
        if self.kind == "refused":
            return row.right is not Right.SAME
        return self.kind == "impossible"

    def __str__(self) -> str:
        return f"{self.kind}: {self.text}" if self.text else self.kind


class Whole(nn.Module):
    """What is sharded: `fully_shard` wants a module with a forward."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, *inputs: object) -> object:
        return self.part(*inputs)


class CannotSpreadError(Exception):
    """Torch does not spread such a module in such a way."""


def spread(module: nn.Module, how: str) -> nn.Module:
    """Spread a module over the ranks: "" is not at all."""
    try:
        if how == "ddp":
            return DistributedDataParallel(module) if any(p.requires_grad for p in module.parameters()) else module
        if how == "fsdp2":
            return fully_shard(Whole(module))
    except Exception as error:
        raise CannotSpreadError(f"{type(error).__name__}: {error}") from error
    return module


def make(row: Row, seed: int, how: str) -> nn.Module:
    """A module of the row: the one that is saved is number 0."""
    torch.manual_seed(seed)
    module = row.build()
    if seed == 0:
        if row.change:
            change(module)
        if row.use is not None:
            row.use(module)
    return spread(module, how)


def judge(row: Row, mode: Mode, directory: Path, how: str = "") -> Verdict:
    """Save and restore a module of the row. All ranks of the default group call, if there is one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            saved, wanted, found = (make(row, seed, how) for seed in (0, 1, 1))
        except CannotSpreadError as error:
            return Verdict("impossible", str(error))
        except Exception as error:  # noqa: BLE001 - reported
            return Verdict("wrong", f"cannot be made: {type(error).__name__}: {_line(error)}")
        with _directory(directory):
            return _judge(row, mode, directory, (saved, wanted, found))


def _judge(row: Row, mode: Mode, directory: Path, modules: tuple[nn.Module, nn.Module, nn.Module]) -> Verdict:
    saved, wanted, found = modules
    before = state_of(found)
    kept = state_of(saved)
    failure: Exception | None = None
    try:
        wanted.load_state_dict(saved.state_dict())
    except Exception as error:  # noqa: BLE001 - whatever torch does is what is right
        failure = error
    # Now, since some modules go on with the very tensors that they were given, which change below.
    expected = state_of(wanted)
    try:
        _save_and_restore(saved, found, mode, directory)
    except ShardwiseError as error:
        return _refused(error, saved, before, found)
    except Exception as error:  # noqa: BLE001 - reported
        return Verdict("wrong", f"{type(error).__name__}: {_line(error)}")
    if failure is not None:
        return Verdict("wrong", f"restored what torch refuses: {_line(failure)}")
    pairs = [("the restored one's state", expected, state_of(found))]
    if not mode.get("is_async"):
        pairs.append(("the saved one's state", kept, state_of(saved)))
    for what, one, other in pairs:
        differing = differences(one, other)
        if differing:
            return Verdict("wrong", f"{what} differs: {', '.join(differing[:4])}")
    shares = bool(differences(expected, state_of(wanted)))
    if row.inputs is not None and not shares and not _run_alike(row, wanted, found):
        return Verdict("wrong", "the restored one computes something else")
    return Verdict("same")


def _save_and_restore(saved: nn.Module, found: nn.Module, mode: Mode, directory: Path) -> None:
    rank = dist.get_rank() if dist.is_initialized() else 0
    config = CheckpointingConfig(checkpoint_dir=directory, save_rng=False, **mode)
    engine = Checkpointer(config, rank, 0, 0)
    try:
        engine.save(0, 1, saved)
        if mode.get("is_async"):
            change(saved)  # training goes on, and knows nothing of what is still being written
        engine.async_wait()
        engine.restore(found)
    finally:
        with contextlib.suppress(ShardwiseError):  # it has been raised
            engine.finalize()


def _refused(error: ShardwiseError, saved: nn.Module, before: Mapping[str, object], found: nn.Module) -> Verdict:
    text = f"{type(error).__name__}: {error.message.splitlines()[0][:160]}"
    if isinstance(error, RemoteError):
        return Verdict("wrong", text)
    names = {type(module).__name__ for module in saved.modules()} - {"Whole"}
    if error.tensor is None and not any(name in str(error) for name in names):
        return Verdict("wrong", f"an error that names neither module nor tensor: {text}")
    changed = differences(before, state_of(found))
    if changed:
        return Verdict("wrong", f"refused after {changed[0]} was overwritten: {text}")
    return Verdict("refused", text)


def _line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0][:160]


@contextlib.contextmanager
def _directory(path: Path) -> Iterator[None]:
    """A directory of all ranks, removed in the end."""
    path.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        if dist.is_initialized():
            dist.barrier()
        shutil.rmtree(path, ignore_errors=True)


def _run_alike(row: Row, wanted: nn.Module, found: nn.Module) -> bool:
    assert row.inputs is not None
    given = row.inputs()
    with torch.no_grad():
        results = []
        for module in (wanted, found):
            torch.manual_seed(5)
            results.append(module.eval()(*copy.deepcopy(given)))
    return is_same(*results)


# --- states ---------------------------------------------------------------------------------------------------------


def state_of(module: nn.Module) -> dict[str, object]:
    """The module's own state dict, copied."""
    return {name: copied(value) for name, value in module.state_dict().items()}


def copied(value: object) -> object:
    """A value of a state dict that later steps leave alone, in terms that can be compared."""
    if isinstance(value, torch.Tensor):
        return _copied_tensor(value)
    if isinstance(value, Mapping):
        return {key: copied(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return tuple(map(copied, value))
    if isinstance(value, torch.ScriptObject):
        return copied(value.__getstate__())
    return copy.deepcopy(value)


def _copied_tensor(value: torch.Tensor) -> object:
    if is_lazy(value):
        return ("lazy",)
    if isinstance(value, ShardedTensor):
        return ("shards", *(copied(shard.tensor) for shard in value.local_shards()))
    local = getattr(value, "_local_tensor", None)
    if local is not None:
        return ("local", tuple(value.shape), copied(local))
    if type(value) is not nn.Parameter and is_traceable_wrapper_subclass(value):
        names, _ = value.__tensor_flatten__()
        return (type(value).__name__, *((name, copied(getattr(value, name))) for name in names))
    if value.is_quantized:
        return ("quantized", str(value.dtype), copied(value.int_repr()), copied(value.dequantize()))
    if value.layout != torch.strided:
        return (str(value.layout), copied(value.to_dense()))
    return value.detach().clone().resolve_conj().resolve_neg()


def differences(one: Mapping[str, object], other: Mapping[str, object]) -> list[str]:
    """Names under which two states differ."""
    names = [*one, *(name for name in other if name not in one)]
    return [n for n in names if n not in one or n not in other or not is_same(one[n], other[n])]


def is_same(one: object, other: object) -> bool:
    """Whether two values are the same, bit for bit."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return (one.shape, one.dtype) == (other.shape, other.dtype) and _bits(one) == _bits(other)
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(is_same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(is_same, one, other))
    return type(one) is type(other) and bool(one == other)


def _bits(tensor: torch.Tensor) -> bytes:
    local = getattr(tensor, "_local_tensor", tensor)
    plain = local.dequantize() if local.is_quantized else local
    return bytes(plain.detach().contiguous().flatten().view(torch.uint8).tolist()) if plain.numel() else b""
