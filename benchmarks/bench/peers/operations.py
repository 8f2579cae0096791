"""What is measured: each operation builds what it needs, carries out a turn, and looks whether the bytes are right."""

from __future__ import annotations

import ctypes
import gc
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from bench.measure import Sample, barrier, measure, tree_bytes
from bench.models import local_tensors
from bench.peers import values
from bench.peers.peer import Peer, Place
from bench.raw import raw_read, raw_write

MIB = 2**20


class Operation:
    """One operation of one peer, on all of its ranks. ``turn`` returns a sample for each of ``parts``."""

    #: The lines of the table that it makes; of a line with "load" or "base" the reference is a read.
    parts: tuple[str, ...] = ()

    def __init__(self, peer: Peer, directory: Path) -> None:
        self.peer = peer
        self.directory = directory
        self.place = peer.place

    def turn(self, number: int) -> list[Sample]:
        """Carry it out once from the start; ``number`` counts from 0, which is not measured."""
        raise NotImplementedError

    def path(self, name: str) -> Path:
        """A name that nobody has used."""
        return self.directory / name

    def model(self, dim: int = 0) -> nn.Module:
        """The model to be saved."""
        own = self.peer.sharded_model(dim)
        return values.filled(self.place.config, self.place.mesh, dim) if own is None else own

    def timed(self, operation: Callable[[], object], fresh_bytes: int = 0) -> Sample:
        """One sample, with the memory of what came before given back first."""
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        return measure(operation, fresh_bytes)

    def saved(self, path: Path, nbytes: int) -> None:
        """Every rank sees all bytes there.

        Raises:
            WrongBytesError: There are fewer.
        """
        barrier()
        if (found := tree_bytes(path)) < nbytes:
            raise values.WrongBytesError(f"{found} bytes were saved of {nbytes}")

    def remove(self, path: Path) -> None:
        """Remove a tree when all ranks are through with it."""
        barrier()
        if self.place.rank == 0:
            shutil.rmtree(path, ignore_errors=True)
        barrier()


def own_bytes(model: nn.Module) -> int:
    """Bytes of this rank's part."""
    return sum(tensor.nbytes for tensor in local_tensors(model))


def all_bytes(model: nn.Module) -> int:
    """Bytes of the whole model."""
    return sum(p.numel() * p.element_size() for p in model.parameters())


class Consolidated(Operation):
    """Files that transformers opens; the first turn compares every element of them."""

    parts = ("consolidated save",)

    def __init__(self, peer: Peer, directory: Path) -> None:
        super().__init__(peer, directory)
        self._model = self.model()
        self._save = peer.consolidated(self._model)

    def turn(self, number: int) -> list[Sample]:
        path, places = self.path("consolidated"), list[Path]()
        sample = self.timed(lambda: places.append(self._save(path)), own_bytes(self._model))
        self.saved(places[0], all_bytes(self._model))
        if not number and self.place.rank == 0:
            values.check_files(places[0], self.place.config)
        self.remove(path)
        return [sample]


class Sharded(Operation):
    """What a run resumes from; what is in it is looked at by the operations that load it."""

    parts = ("sharded save",)

    def __init__(self, peer: Peer, directory: Path) -> None:
        super().__init__(peer, directory)
        self._model = self.model()
        self._save = peer.sharded(self._model)

    def turn(self, number: int) -> list[Sample]:
        path = self.path("sharded")
        sample = self.timed(lambda: self._save(path), own_bytes(self._model))
        self.saved(path, all_bytes(self._model))
        self.remove(path)
        return [sample]


class Stalled(Operation):
    """How long training stands still: afterwards the parameters are overwritten, and what is saved must not change."""

    parts = ("stall of an asynchronous save",)

    def __init__(self, peer: Peer, directory: Path) -> None:
        super().__init__(peer, directory)
        self._model = self.model()
        self._stall = peer.stall(self._model)
        self._load = peer.load(self._model)

    def turn(self, number: int) -> list[Sample]:
        path = self.path("stall")
        values.fill(self._model)
        sample = self.timed(lambda: self._stall.begin(path))
        values.clear(self._model)
        self._stall.finish()
        self.saved(path, all_bytes(self._model))
        values.check_model(self._load(path) or self._model)
        self.remove(path)
        return [sample]


class _Loaded(Operation):
    saved_by, loaded_by = 0, 1

    def __init__(self, peer: Peer, directory: Path) -> None:
        super().__init__(peer, directory)
        self._path = self.path(f"saved{self.saved_by}")
        saved = self.model(self.saved_by)
        peer.sharded(saved)(self._path)
        barrier()
        peer.close()
        del saved
        self._model = self.model(self.loaded_by)
        self._load = peer.load(self._model)

    def turn(self, number: int) -> list[Sample]:
        values.clear(self._model)
        loaded: list[nn.Module | None] = []
        sample = self.timed(lambda: loaded.append(self._load(self._path)))
        values.check_model(loaded[0] or self._model)
        return [sample]


class ToColumns(_Loaded):
    """Saved by rows."""

    parts = ("load, rows to columns",)


class ToRows(_Loaded):
    """Saved by columns."""

    parts = ("load, columns to rows",)
    saved_by, loaded_by = 1, 0


class Base(Operation):
    """A sharded model made of a Hugging Face directory; its own memory is not counted as extra."""

    parts = ("base model load",)

    def __init__(self, peer: Peer, directory: Path) -> None:
        super().__init__(peer, directory)
        self._load = peer.base()

    def turn(self, number: int) -> list[Sample]:
        loaded: list[nn.Module] = []
        sample = self.timed(lambda: loaded.append(self._load(self.place.base)))
        values.check_model(loaded[0])
        beyond = max(0.0, sample.peak - own_bytes(loaded[0]) / MIB)
        return [Sample(sample.seconds, sample.cpu, beyond)]


class State(Operation):
    """Model and AdamW's moments together, of a model of a third of the size: as many bytes."""

    parts = ("model and optimizer save", "model and optimizer load")

    def __init__(self, peer: Peer, directory: Path) -> None:
        super().__init__(peer, directory)
        self._model = self.model()
        self._optimizer = values.adamw(self._model)
        self._state = peer.state(self._model, self._optimizer)

    def turn(self, number: int) -> list[Sample]:
        path = self.path("state")
        values.fill(self._model)
        values.fill_moments(self._model, self._optimizer)
        save = self.timed(lambda: self._state.save(path), 3 * own_bytes(self._model))
        self.saved(path, 3 * all_bytes(self._model))
        values.clear(self._model)
        for tensor in values.moments(self._optimizer):
            tensor.zero_()
        loaded: list[object] = []
        load = self.timed(lambda: loaded.append(self._state.load(path)))
        model, optimizer = loaded[0] if isinstance(loaded[0], tuple) else (self._model, self._optimizer)
        values.check_model(model)
        values.check_optimizer(model, optimizer)
        self.remove(path)
        return [save, load]


#: In the order of the table. The last one's model is a third as large.
OPERATIONS: dict[str, type[Operation]] = {
    "consolidated": Consolidated,
    "sharded": Sharded,
    "stall": Stalled,
    "columns": ToColumns,
    "rows": ToRows,
    "base": Base,
    "state": State,
}


class Raw:
    """The reference of a turn: this rank's bytes in large calls, into and out of a file of its own."""

    def __init__(self, place: Place, directory: Path, name: str) -> None:
        self._directory, self._name, self._place = directory, name, place
        self._path = directory / f"raw{place.rank}"
        model = values.filled(place.config, place.mesh, int(name == "columns"))
        optimizer = values.adamw(model) if name == "state" else None
        self._tensors = [*local_tensors(model), *(values.moments(optimizer) if optimizer else [])]
        self._reads = name in ("columns", "rows", "base")
        if self._reads:
            raw_write(self._tensors, self._path)

    def turn(self, number: int) -> list[Sample]:
        """As many samples as the operation has."""
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        if self._reads:
            return [measure(self._read)]
        written = measure(lambda: raw_write(self._tensors, self._path), sum(t.nbytes for t in self._tensors))
        samples = [written, measure(self._read)] if self._name == "state" else [written]
        self._path.unlink()
        dist.barrier()
        return samples

    def _read(self) -> None:
        # A base model's memory is new: so is the reference's.
        fresh = self._name == "base"
        raw_read([torch.empty_like(t) for t in self._tensors] if fresh else self._tensors, self._path)
