"""``model_save_format="torch_save"``: DCP's own ``.distcp`` directories, written by DCP's own writer."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save

from shardwise.comm import Group
from shardwise.engine.records import ComponentRecord
from shardwise.engine.replicas import Seen, comparison, look_at, refuse
from shardwise.errors import MisuseError, ShardwiseError
from shardwise.io.regions import is_packed
from shardwise.plan.fragments import HeldTensor
from shardwise.plan.ownership import left_to_others
from shardwise.plan.roster import Roster
from shardwise.stateful_wrappers import ModelState, OptimizerState
from shardwise.stateful_wrappers.tensors import local_memory


def save_distcp(
    state: ModelState | OptimizerState, directory: Path, group: Group, held: Sequence[HeldTensor], roster: Roster
) -> ComponentRecord:
    """Write a state as a DCP directory. All ranks of the group call.

    Args:
        state: The state.
        directory: Where the files go.
        group: The ranks that save together.
        held: What this rank holds, under the state's names.
        roster: Who holds what.

    Raises:
        ReplicasDifferError: Ranks that hold a tensor as replicas have different values of it.
        MisuseError: A tensor is sharded in a way that DCP's format describes wrongly.
        ShardwiseError: What DCP's writer failed with, on every rank.
    """
    tensors: dict[str, torch.Tensor] = {}
    replicas = comparison((), roster, group.rank)
    with group.together("describing what DCP is to write"):
        replicas = comparison(held, roster, group.rank)
        # DCP would choose between replicas by the bytes that each rank writes.
        others = left_to_others(held, roster, group.rank)
        tensors = {name: tensor for name, tensor in state.state_dict().items() if name not in others}
        for name, tensor in tensors.items():
            if is_packed(tensor):
                raise MisuseError(
                    "what this rank holds of it is not the one region that a .distcp file would record",
                    tensor=name,
                    hint='Set model_save_format to "safetensors".',
                )
    failure: BaseException | None = None
    seen = Seen()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            writer = FileSystemWriter(str(directory), single_file_per_rank=True, sync_files=True)
            save(tensors, storage_writer=writer, process_group=group.process_group)
        seen = look_at([replicas.reading({name: local_memory(tensor) for name, tensor in tensors.items()})])
    except Exception as error:  # noqa: BLE001 - raised on every rank by fold()
        failure = _cause(error)
    _, [differ] = group.fold([], [seen.share], f"writing {directory}", failure)
    if differ:
        refuse(seen, group)
    return ComponentRecord()


def _cause(error: Exception) -> ShardwiseError:
    failures = getattr(error, "failures", None)
    if isinstance(failures, dict) and failures:
        rank, (cause, _) = next(iter(failures.items()))
        return ShardwiseError.wrap(cause, rank=int(rank))
    return ShardwiseError.wrap(error)
