"""Writes `automodel/` with NeMo AutoModel 0.7.0 itself, and compares going on there with going on here.

Needs ``nemo-automodel`` (installed without its dependencies, apart from the environment of the tests), and an empty
directory, whose path ends up in the files:

    torchrun --nproc-per-node 2 tests/interop/make_automodel.py save DIRECTORY safetensors
    torchrun --nproc-per-node N tests/interop/make_automodel.py there DIRECTORY safetensors
    torchrun --nproc-per-node N tests/interop/make_automodel.py here DIRECTORY safetensors

Each writes what became of losses, parameters, moments and options to a JSON file; they have to be equal. Of
what `save` wrote, ``epoch_0_step_3`` and ``saved.json`` are kept, without the script ``consolidate.sh``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch.distributed as dist
from tests.interop.automodel_run import build, everything, steps

from shardwise import CheckpointingConfig


class Position:
    """A dataloader's state."""

    def state_dict(self) -> dict[str, object]:
        return {"position": 7}

    def load_state_dict(self, state_dict: dict[str, object]) -> None:
        pass


def main(mode: str, root: Path, form: str) -> None:
    """Save, or go on."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    path = root / "epoch_0_step_3"
    model, optimizer, scheduler = build({"save": 0, "there": 1, "here": 2}[mode])
    if mode == "here":
        with CheckpointingConfig(checkpoint_dir=root).build(dp_rank=rank, tp_rank=0, pp_rank=0) as ours:
            ours.restore(model, optimizer, scheduler)
    else:
        from nemo_automodel.components.checkpoint import checkpointing  # type: ignore[import-not-found]

        config = checkpointing.CheckpointingConfig(
            checkpoint_dir=str(root),
            model_save_format=form,
            save_consolidated=False,
            model_cache_dir=str(root / "cache"),
            model_repo_id="organisation/name",
        )
        theirs = checkpointing.Checkpointer(config, rank, 0, 0)
        if mode == "save":
            steps(model, optimizer, scheduler, 0, 3)
            path.mkdir(parents=True, exist_ok=True)
            theirs.save_model(model, str(path))
            theirs.save_optimizer(optimizer, model, str(path), scheduler)
            theirs.save_on_dp_ranks(Position(), "dataloader", str(path))
            _write(root / "saved.json", everything(model, optimizer))
        else:
            theirs.load_model(model, str(path / "model"))
            theirs.load_optimizer(optimizer, model, str(path), scheduler)
    losses = steps(model, optimizer, scheduler, 3, 2)
    _write(root / f"{mode}-{dist.get_world_size()}.json", [losses, everything(model, optimizer)])
    dist.destroy_process_group()


def _write(path: Path, value: object) -> None:
    if dist.get_rank() == 0:
        path.write_text(json.dumps(value, indent=1, sort_keys=True))
    dist.barrier()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3])
