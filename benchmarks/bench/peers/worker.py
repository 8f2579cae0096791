"""The processes of a peer: they live as long as the run, and carry out what the parent tells them."""

from __future__ import annotations

import gc
import importlib
import logging
import os
import shutil
import traceback
import warnings
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from bench.measure import Sample
from bench.peers.operations import OPERATIONS, Operation, Raw
from bench.peers.peer import CannotError, Peer, Place
from bench.peers.values import filled, llama_config

#: Where each peer's class is; the libraries themselves are imported by the peer's own processes only.
PEERS = {
    "shardwise": "bench.peers.ours:Shardwise",
    "NeMo AutoModel": "bench.peers.automodel:AutoModel",
    "torch": "bench.peers.dcp:Torch",
    "transformers, gathered": "bench.peers.hub:Gathered",
    "transformers, distributed": "bench.peers.hub:Distributed",
    "accelerate": "bench.peers.dcp:Accelerate",
    "torchtitan": "bench.peers.dcp:Torchtitan",
}
RAW = "raw"


@dataclass(frozen=True)
class Job:
    """What one process is: a rank of a peer."""

    peer: str
    rank: int
    ranks: int
    port: int
    directory: Path
    size: float


@dataclass(frozen=True)
class Answer:
    """What a rank says to a command: samples, or a reason why there are none."""

    samples: tuple[Sample, ...] = ()
    reason: str = ""
    failed: str = ""


def main(job: Job, pipe: Connection) -> None:
    """Answer commands until the parent says ``None``: ``(operation, None)`` prepares, ``(operation, n)`` is turn n, and
    an empty name lets go of what the last one made."""
    _environment(job)
    dist.init_process_group("gloo", rank=job.rank, world_size=job.ranks)
    current: Operation | Raw | None = None
    while (command := pipe.recv()) is not None:
        name, number = command
        try:
            if number is None:
                current = None
                gc.collect()
                current = _prepared(job, name) if name else None
                pipe.send(Answer())
            else:
                assert current is not None
                pipe.send(Answer(tuple(current.turn(number))))
        except CannotError as error:
            pipe.send(Answer(reason=str(error)))
        except Exception:  # noqa: BLE001 - it is another library's, and the others go on
            pipe.send(Answer(failed=traceback.format_exc()))
    dist.destroy_process_group()


def _environment(job: Job) -> None:
    os.environ.update(
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(job.port),
        RANK=str(job.rank),
        LOCAL_RANK=str(job.rank),
        WORLD_SIZE=str(job.ranks),
        LOCAL_WORLD_SIZE=str(job.ranks),
        TQDM_DISABLE="1",
        HF_HUB_OFFLINE="1",
        HF_HUB_DISABLE_PROGRESS_BARS="1",
        TOKENIZERS_PARALLELISM="false",
    )
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)


def _prepared(job: Job, name: str) -> Operation | Raw:
    own = job.directory / job.peer.replace(", ", "-").replace(" ", "-") / name
    if job.rank == 0:
        shutil.rmtree(own.parent, ignore_errors=True)
        own.mkdir(parents=True)
    dist.barrier()
    config = llama_config(job.size / 3 if name == "state" else job.size)
    base = job.directory / ("base-third" if name == "state" else "base")
    mesh = init_device_mesh("cpu", (job.ranks,), mesh_dim_names=("dp",))
    place = Place(job.rank, mesh, config, base)
    if job.peer == RAW:
        if job.rank == 0 and not base.exists():
            filled(config, None).save_pretrained(base, max_shard_size="450MB")
        dist.barrier()
        return Raw(place, own, name)
    module, _, attribute = PEERS[job.peer].partition(":")
    peer: Peer = getattr(importlib.import_module(module), attribute)(place)
    return OPERATIONS[name](peer, own)
