"""A run whose every value follows from the step, so that what is restored can be told right from wrong to the bit."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tests.faults.layer import Tape, TapedStorage
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from shardwise.checkpointing import Checkpointer
from shardwise.config import CheckpointingConfig
from shardwise.errors import ShardwiseError

#: Name, shape, and the dimension along which two ranks share it (None: both hold it).
TENSORS = (
    ("embed", (6, 4), 0),
    ("rows", (5, 4), 0),
    ("columns", (4, 6), 1),
    ("bias", (4,), None),
    ("head", (6, 4), 0),
)


class Net(nn.Module):
    """Five tensors, cut in three ways."""

    def __init__(self, mesh: DeviceMesh | None = None) -> None:
        super().__init__()
        for number, (name, shape, dim) in enumerate(TENSORS):
            data = torch.full(shape, float(number))
            if mesh is not None:
                data = distribute_tensor(data, mesh, [Replicate() if dim is None else Shard(dim)], src_data_rank=None)
            self.register_parameter(name, nn.Parameter(data))


class Tokenizer:
    """Writes files past the storage layer, as real tokenizers do."""

    def save_pretrained(self, directory: str) -> None:
        Path(directory, "tokenizer.json").write_text(json.dumps({"vocab": list(range(40))}))
        Path(directory, "tokenizer_config.json").write_text("{}")


def value(number: int, step: int, kind: str = "parameter") -> float:
    """The value of every element of one tensor after a step."""
    return number + step * {"parameter": 0.25, "exp_avg": 0.5, "exp_avg_sq": 0.75}[kind]


class Run:
    """Model, optimizer and what else a run keeps."""

    def __init__(self, mesh: DeviceMesh | None = None) -> None:
        self.model = Net(mesh)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.0)
        self.extra: dict[str, object] = {"seen": -1}

    def advance(self, step: int) -> None:
        """Set everything to what belongs to ``step``."""
        with torch.no_grad():
            for parameter in self.model.parameters():
                if not self.optimizer.state[parameter]:
                    parameter.grad = torch.zeros_like(parameter)
            self.optimizer.step()
            for number, parameter in enumerate(self.model.parameters()):
                parameter.fill_(value(number, step))
                state = self.optimizer.state[parameter]
                for kind in ("exp_avg", "exp_avg_sq"):
                    state[kind].fill_(value(number, step, kind))
        self.extra["seen"] = step

    def wrong(self, step: int) -> str | None:
        """What does not belong to ``step``, or ``None``."""
        for number, (name, parameter) in enumerate(self.model.named_parameters()):
            state = self.optimizer.state[parameter]
            found = {"parameter": parameter, "exp_avg": state["exp_avg"], "exp_avg_sq": state["exp_avg_sq"]}
            for kind, tensor in found.items():
                local = tensor.detach()
                local = local.to_local() if hasattr(local, "to_local") else local
                if not bool((local == value(number, step, kind)).all()):
                    return f"{kind} of {name} is not that of step {step}: {local.flatten()[:3].tolist()}"
        if self.extra["seen"] != step:
            return f"the extra state is that of step {self.extra['seen']}, not {step}"
        return None


def settings(root: Path, **changes: object) -> CheckpointingConfig:
    """The configuration of every run here."""
    values: dict[str, object] = {
        "checkpoint_dir": str(root),
        "save_consolidated": "every",
        "max_file_bytes": 220,
        "io_threads": 1,
        "collective_timeout_seconds": 20.0,
        **changes,
    }
    return CheckpointingConfig(**values)  # type: ignore[arg-type]


def checkpointer(
    config: CheckpointingConfig, tape: Tape | None = None, rank: int = 0, links: bool = True
) -> Checkpointer:
    """A checkpointer, through the layer where there is a tape; ``links``: symbolic links can be made there."""
    if tape is None:
        return Checkpointer(config, rank, 0, 0)
    return Checkpointer(config, rank, 0, 0, storage=TapedStorage(tape, links))


def save(engine: Checkpointer, run: Run, step: int) -> None:
    """One save, waited for."""
    run.advance(step)
    metrics = {"default": 1000.0 - step}  # every save is the best, so that both pointers move
    engine.save(
        0, step, run.model, run.optimizer, tokenizer=Tokenizer(), metrics=metrics, extra_state={"loop": run.extra}
    )
    engine.async_wait()


def restore(engine: Checkpointer, run: Run, restore_from: str = "LATEST") -> int | None:
    """Resume, or go back; the step, or ``None`` where there is nothing.

    Raises:
        AssertionError: What came back belongs to another step than it says.
        ShardwiseError: Nothing could be restored.
    """
    record = engine.restore(run.model, run.optimizer, restore_from=restore_from, extra_state={"loop": run.extra})
    if record is None:
        return None
    problem = run.wrong(int(record.step or 0))
    assert problem is None, problem
    return record.step


def short(error: BaseException) -> str:
    """Type and first words of an error."""
    text = error.message if isinstance(error, ShardwiseError) else str(error)
    return f"{type(error).__name__}: {text[:120]}"
