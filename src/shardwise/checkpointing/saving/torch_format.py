"""``model_save_format="torch_save"``: DCP's own ``.distcp`` directories, written by DCP's own writer."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save

from shardwise.checkpointing.session import Session
from shardwise.comm import Group
from shardwise.dcp.regions import is_packed
from shardwise.engine.records import ComponentRecord
from shardwise.engine.replicas import Comparison, look_at, refuse, share_of
from shardwise.errors import MisuseError, ShardwiseError
from shardwise.timing import count_bytes, phase
from shardwise.upstream.torch_modules import EXTRA
from shardwise.upstream.torch_tensors import local_part


def capture_distcp(session: Session, component: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A state's tensors for DCP, staged in asynchronous mode; what it would describe wrongly is refused. Local."""
    for name, tensor in tensors.items():
        if is_packed(tensor):
            raise MisuseError(
                "what this rank holds of it is not the one region that a .distcp file would record",
                tensor=name,
                hint='Set model_save_format to "safetensors".',
            )
    return (
        dict(tensors) if session.stager is None else session.stager.stage_tensors(session.prefix + component, tensors)
    )


@phase("write")
def write_distcp(
    tensors: Mapping[str, torch.Tensor], directory: Path, group: Group, *, replicas: Comparison, others: Collection[str]
) -> ComponentRecord:
    """Write what `capture_distcp` captured as a DCP directory. All ranks of the group call.

    ``replicas`` are compared. A lower rank writes the tensors named in ``others``, since replicas may have other values
    of them; DCP itself would choose by the bytes that each rank writes.
    """
    failure: BaseException | None = None
    seen: list[Comparison] = []
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            writer = FileSystemWriter(str(directory), single_file_per_rank=True, sync_files=True)
            own = {name: tensor for name, tensor in tensors.items() if name not in others}
            save(own, storage_writer=writer, process_group=group.process_group)
        seen = look_at([replicas.reading({name: local_part(tensor) for name, tensor in tensors.items()})])
    except Exception as error:  # noqa: BLE001 - raised on every rank by fold()
        failure, theirs = ShardwiseError.wrap(error), getattr(error, "failures", None)
        if isinstance(theirs, dict) and theirs:  # DCP's own, with what failed on each rank
            rank, (cause, _) = next(iter(theirs.items()))
            failure = ShardwiseError.wrap(cause, rank=int(rank))
    count_bytes(sum(local_part(tensor).nbytes for name, tensor in tensors.items() if name not in others))
    _, [differ] = group.fold([], [share_of(seen)], f"writing {directory}", failure)
    if differ:
        refuse(seen, group)
    return ComponentRecord()


def tensors_alone(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The ordinary tensors of a model's state, without extra state and quantized tensors."""
    return {
        name: value
        for name, value in state.items()
        if isinstance(value, torch.Tensor) and not value.is_quantized and name.rpartition(".")[2] != EXTRA
    }
