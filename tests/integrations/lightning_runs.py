"""Runs of Lightning's Trainer and Fabric with shardwise's strategies, in processes of their own."""

from __future__ import annotations

import json
import multiprocessing
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tests.integrations.accelerate_runs import Result, masked, result_of
from tests.integrations.runs import announce, die_when_opening, digest, errors_of, launch, model, rows
from torch.utils.data import DataLoader


@dataclass(frozen=True)
class Run:
    """A training of two epochs of 40 samples, with a checkpoint after steps 3, 6, 9, 13, ... of each epoch's 10.

    Attributes:
        directory: The checkpoints' directory.
        kind: What makes the loop: ``Trainer`` or ``Fabric``.
        world: Number of ranks.
        fsdp: Sharded with FSDP2; otherwise several ranks train with DistributedDataParallel.
        batch: Samples of one rank in a step.
        is_async: Checkpoints are written in the background.
        masks: Batches are made with random masks.
        stateful: They come from torchdata's loader.
        workers: Processes that make them.
        lora: An adapter is trained.
        dropout: How much of it.
        steps: The run ends after so many.
        killed_in: Rank 0 dies when it opens a file of tensors below such a path.
    """

    directory: Path
    kind: str = "Trainer"
    world: int = 1
    fsdp: bool = False
    batch: int = 4
    is_async: bool = False
    masks: bool = False
    stateful: bool = False
    workers: int = 0
    lora: bool = False
    dropout: float = 0.1
    steps: int = 20
    killed_in: str = ""


def train(run: Run, tmp_path: Path) -> list[int]:
    """Train, and return the ranks' exit codes."""
    return launch(_rank, run, run.world, tmp_path)


def result(run: Run, tmp_path: Path) -> Result:
    """Train, and return what came of it."""
    codes = train(run, tmp_path)
    assert codes == [0] * run.world, errors_of(run.world, tmp_path)
    return result_of((tmp_path / "rank-0").read_text())


def strategy_of(run: Run) -> Any:
    from shardwise import CheckpointingConfig
    from shardwise.integrations import lightning

    prefix = "Shardwise" if run.kind == "Trainer" else "ShardwiseFabric"
    name = "ModelParallel" if run.fsdp else "DDP" if run.world > 1 else "SingleDevice"
    sizes: dict[str, Any] = {"data_parallel_size": run.world, "tensor_parallel_size": 1} if run.fsdp else {}
    if run.fsdp and run.kind == "Fabric":
        sizes["parallelize_fn"] = lambda module, mesh: _shard(module, mesh["data_parallel"])
    settings = CheckpointingConfig(is_async=run.is_async, save_consolidated="every")
    return getattr(lightning, f"{prefix}{name}Strategy")(checkpointing=settings, **sizes)


def loader_of(run: Run) -> Any:
    cls: Any = DataLoader
    if run.stateful:
        from torchdata.stateful_dataloader import StatefulDataLoader as cls
    makes = masked if run.masks else None
    # Processes that are forked end with a rank that is killed.
    workers: dict[str, Any] = {"num_workers": run.workers, "multiprocessing_context": "fork"} if run.workers else {}
    return cls(rows(40, 1), batch_size=run.batch, shuffle=True, collate_fn=makes, **workers)


def _rank(run: Run, rank: int, port: int) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    multiprocessing.current_process().daemon = False  # which may not have workers
    if run.world > 1 or run.fsdp:
        announce(rank, run.world, port)
        os.environ |= {"TORCHELASTIC_RUN_ID": "test", "GROUP_RANK": "0"}
    if run.killed_in and rank == 0:
        die_when_opening(run.killed_in)
    said = _trainer(run) if run.kind == "Trainer" else _fabric(run)
    print(json.dumps(said))
    if dist.is_initialized():
        dist.destroy_process_group()


def trained(module: torch.nn.Module) -> list[torch.nn.Parameter]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def _shard(module: Any, mesh: Any) -> Any:
    from torch.distributed.fsdp import fully_shard

    inside = module.get_base_model() if hasattr(module, "get_base_model") else module
    for layer in inside.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(module, mesh=mesh)


def _trainer(run: Run) -> dict[str, object]:
    import lightning as L
    from lightning.pytorch.callbacks import ModelCheckpoint

    class Lit(L.LightningModule):
        def __init__(self, lr: float = 2e-3) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.losses: dict[int, float] = {}
            self.weights = ""
            self.model: Any = model(lora=run.lora, dropout=run.dropout)

        def configure_model(self) -> None:
            from torch.distributed.fsdp import FSDPModule

            if run.fsdp and not isinstance(self.model, FSDPModule):
                _shard(self.model, self.device_mesh["data_parallel"])

        def training_step(self, batch: Any, index: int) -> Any:
            loss = self.model(**batch).loss
            self.losses[self.global_step + 1] = float(self.trainer.strategy.reduce(loss.detach(), reduce_op="mean"))
            return loss

        def validation_step(self, batch: Any, index: int) -> None:
            self.log("val_loss", self.model(**batch).loss, sync_dist=True)

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.AdamW(trained(self), lr=self.hparams.lr)
            return [optimizer], [torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=4)]

        def on_train_end(self) -> None:
            self.weights = digest(self.model)

    class Data(L.LightningDataModule):
        resumed = 0

        def state_dict(self) -> dict[str, int]:
            return {"resumed": self.resumed + 1}

        def load_state_dict(self, state: dict[str, int]) -> None:
            self.resumed = state["resumed"]

        def train_dataloader(self) -> Any:
            return loader_of(run)

        def val_dataloader(self) -> Any:
            return DataLoader(rows(8, 1), batch_size=run.batch)  # type: ignore[arg-type]

    L.seed_everything(0)
    lit, data = Lit(), Data()
    keeps = ModelCheckpoint(run.directory, monitor="val_loss", save_top_k=2, save_last=True)
    trainer = L.Trainer(
        max_steps=run.steps,
        max_epochs=2,
        callbacks=[keeps],
        accelerator="cpu",
        devices=run.world,
        strategy=strategy_of(run),
        val_check_interval=3,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(lit, datamodule=data, ckpt_path="last")
    started = min(lit.losses) - 1
    assert data.resumed == (1 if started else 0)
    return {"losses": lit.losses, "weights": [lit.weights, Path(keeps.best_model_path).name], "started": started}


def _fabric(run: Run) -> dict[str, object]:
    import lightning as L

    fabric = L.Fabric(accelerator="cpu", devices=run.world, strategy=strategy_of(run))
    fabric.launch()
    fabric.seed_everything(0)
    module: Any = model(lora=run.lora, dropout=run.dropout)
    module = fabric.setup_module(module)
    optimizer = fabric.setup_optimizers(torch.optim.AdamW(trained(module), lr=2e-3))
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer.optimizer, 1.0, 0.1, total_iters=20)
    loader = fabric.setup_dataloaders(loader_of(run))
    state = {"model": module, "optimizer": optimizer, "scheduler": scheduler, "loader": loader, "steps": 0, "epoch": 0}
    path = run.directory / "last.ckpt"
    if path.exists():
        fabric.load(path, state)
    started, losses = state["steps"], {}
    while state["epoch"] < 2 and state["steps"] < run.steps:
        for batch in loader:
            loss = module(**batch).loss
            fabric.backward(loss)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            state["steps"] += 1
            losses[state["steps"]] = float(fabric.all_reduce(loss.detach(), reduce_op="mean"))
            if state["steps"] % 3 == 0:
                fabric.save(path, state)
            if state["steps"] == run.steps:
                break
        state["epoch"] += 1
    fabric.strategy.wait_for_saves()
    return {"losses": losses, "weights": [digest(module)], "started": started}
