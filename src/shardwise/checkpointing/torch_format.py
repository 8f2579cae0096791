"""``model_save_format="torch_save"``: DCP's own ``.distcp`` directories, written by DCP's own writer."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save

from shardwise.comm import Group
from shardwise.engine.records import ComponentRecord
from shardwise.errors import MisuseError, ShardwiseError
from shardwise.io.regions import is_packed
from shardwise.stateful_wrappers import ModelState, OptimizerState
from shardwise.stateful_wrappers.ways import EXTRA


def save_distcp(state: ModelState | OptimizerState, directory: Path, group: Group) -> ComponentRecord:
    """Write a state as a DCP directory. All ranks of the group call.

    Raises:
        MisuseError: A tensor is sharded in a way that DCP's format describes wrongly.
        ShardwiseError: What DCP's writer failed with, on every rank.
    """
    tensors: dict[str, torch.Tensor] = {}
    with group.together("describing what DCP is to write"):
        # What is no tensor is written beside, without pickle.
        tensors = {name: value for name, value in state.state_dict().items() if not _is_aside(name, value)}
        for name, tensor in tensors.items():
            if is_packed(tensor):
                raise MisuseError(
                    "what this rank holds of it is not the one region that a .distcp file would record",
                    tensor=name,
                    hint='Set model_save_format to "safetensors".',
                )
    failure: BaseException | None = None
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            writer = FileSystemWriter(str(directory), single_file_per_rank=True, sync_files=True)
            save(tensors, storage_writer=writer, process_group=group.process_group)
    except Exception as error:  # noqa: BLE001 - raised on every rank by agree()
        failure = _cause(error)
    group.agree(failure, f"writing {directory}")
    return ComponentRecord()


def _is_aside(name: str, value: object) -> bool:
    return not isinstance(value, torch.Tensor) or value.is_quantized or name.rpartition(".")[2] == EXTRA


def _cause(error: Exception) -> ShardwiseError:
    failures = getattr(error, "failures", None)
    if isinstance(failures, dict) and failures:
        rank, (cause, _) = next(iter(failures.items()))
        return ShardwiseError.wrap(cause, rank=int(rank))
    return ShardwiseError.wrap(error)
