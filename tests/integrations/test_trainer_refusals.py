"""What a `ShardwiseTrainer` refuses, and says so before training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from tests.integrations.runs import model, rows

from shardwise import CheckpointingConfig
from shardwise.errors import CheckpointNotFoundError, ConfigError, MisuseError

if TYPE_CHECKING:
    from shardwise.integrations.transformers import ShardwiseTrainer


def trainer(
    directory: Path, cls: type[ShardwiseTrainer] | None = None, settings: dict[str, Any] | None = None, **options: Any
) -> ShardwiseTrainer:
    from transformers import TrainingArguments

    from shardwise.integrations.transformers import ShardwiseTrainer

    checkpointing = None if settings is None else CheckpointingConfig(**settings)
    options = {"max_steps": 1, "report_to": "none", "use_cpu": True, "disable_tqdm": True} | options
    args = TrainingArguments(output_dir=str(directory), **options)
    return (cls or ShardwiseTrainer)(model=model(), args=args, train_dataset=rows(8, 1), checkpointing=checkpointing)


@pytest.mark.parametrize("name", ["push_to_hub", "enable_jit_checkpoint", "save_on_each_node"])
def test_arguments(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"ShardwiseTrainer does not support {name}"):
        trainer(tmp_path, **{name: True})


@pytest.mark.parametrize("name", ["DeepSpeed", "FSDP 1", "Megatron-LM", "torch_xla"])
def test_ways_of_spreading_a_model(name: str, tmp_path: Path) -> None:
    from accelerate.utils import DistributedType

    from shardwise.integrations.transformers import ShardwiseTrainer

    kinds = {"Megatron-LM": DistributedType.MEGATRON_LM, "torch_xla": DistributedType.XLA}

    class Spread(ShardwiseTrainer):
        def create_accelerator_and_postprocess(self) -> None:
            super().create_accelerator_and_postprocess()
            self.is_deepspeed_enabled = name == "DeepSpeed"
            plugin = SimpleNamespace(fsdp_version=1) if name == "FSDP 1" else None
            self.accelerator = SimpleNamespace(
                state=SimpleNamespace(fsdp_plugin=plugin),
                distributed_type=kinds.get(name, DistributedType.NO),
                unwrap_model=lambda module: module,
            )

    with pytest.raises(ConfigError, match=f"ShardwiseTrainer does not support {name}"):
        trainer(tmp_path, Spread)


@pytest.mark.parametrize(
    ("settings", "options", "message"),
    [
        ({"checkpoint_dir": "elsewhere"}, {}, "checkpointing sets checkpoint_dir, which ShardwiseTrainer takes from"),
        ({"max_recent_checkpoints": 2}, {}, "takes from save_total_limit"),
        ({"best_metric_mode": "max"}, {}, "takes from greater_is_better"),
        ({"enabled": False}, {}, "takes from save_strategy"),
        ({"is_peft": True}, {}, "the LlamaForCausalLM has no adapter"),
        ({"is_async": True, "skip_save_while_busy": True}, {"metric_for_best_model": "loss"}, "could skip the best"),
        ({"model_save_format": "torch_save", "save_consolidated": "every"}, {}, "writes no Hugging Face export"),
    ],
)
def test_settings(settings: dict[str, Any], options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        trainer(tmp_path, settings=settings, **options)


def test_methods_that_nothing_would_call(tmp_path: Path) -> None:
    from transformers import Trainer

    from shardwise.integrations.transformers import ShardwiseTrainer

    class Own(ShardwiseTrainer):
        def _save_rng_state(self, output_dir: str) -> None: ...

    class Host(Trainer):  # type: ignore[misc]
        def _save_checkpoint(self, model: object, trial: object) -> None: ...

    class Reversed(ShardwiseTrainer, Host): ...

    class Cooperative(Host, ShardwiseTrainer): ...

    with pytest.raises(ConfigError, match=r"Own\._save_rng_state would never be called: ShardwiseTrainer"):
        trainer(tmp_path, Own)
    with pytest.raises(ConfigError, match=r"Host\._save_checkpoint would never be called.*Reversed\(Host, Shard"):
        trainer(tmp_path, Reversed)
    trainer(tmp_path, Cooperative)


def test_checkpoints_that_cannot_be_resumed_from(tmp_path: Path) -> None:
    own, theirs, plain = tmp_path / "own", tmp_path / "theirs", tmp_path / "plain"
    with pytest.raises(CheckpointNotFoundError, match="there is no checkpoint to resume from"):
        trainer(own).train(resume_from_checkpoint=True)
    trainer(own, save_only_model=True).train()
    with pytest.raises(MisuseError, match="saved with save_only_model"):
        trainer(own).train(resume_from_checkpoint=True)
    with pytest.raises(MisuseError, match=r"begin afresh in a directory that has checkpoints \(epoch_0_step_1"):
        trainer(own).train()
    (theirs / "checkpoint-4").mkdir(parents=True)
    (theirs / "checkpoint-4" / "trainer_state.json").write_text("{}")
    with pytest.raises(MisuseError, match="saved by the Trainer itself"):
        trainer(theirs).train(resume_from_checkpoint=theirs / "checkpoint-4")
    with pytest.raises(MisuseError, match="which would delete it at the end"):
        trainer(theirs, save_total_limit=1).train()
    linear = torch.nn.Linear(2, 2)
    with CheckpointingConfig(checkpoint_dir=plain).build() as checkpointer:
        checkpointer.save(step=1, model=linear, optimizer=torch.optim.SGD(linear.parameters()))
    with pytest.raises(MisuseError, match="no ShardwiseTrainer has saved it"):
        trainer(tmp_path / "new").train(resume_from_checkpoint=plain / "epoch_0_step_1")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda made: made.push_to_hub(), "uploads output_dir with every checkpoint"),
        (lambda made: made.hyperparameter_search(), "is not supported by ShardwiseTrainer"),
        (lambda made: made.train(trial={"learning_rate": 1}), "is not supported by ShardwiseTrainer"),
        (lambda made: made.write_checkpoint(), "saving a checkpoint outside of train"),
    ],
    ids=["push", "search", "trial", "save"],
)
def test_calls(call: Callable[[ShardwiseTrainer], object], message: str, tmp_path: Path) -> None:
    with pytest.raises(MisuseError, match=message):
        call(trainer(tmp_path))
