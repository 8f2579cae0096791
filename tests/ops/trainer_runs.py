"""Runs of transformers' own Trainer with FSDP, in processes of their own: small random Llamas on random tokens.

accelerate turns FSDP on only where there are accelerators. As in `tests.integrations.runs` its paths are taken on the
CPU, with gloo; all that is written is transformers' and accelerate's own.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from tests.integrations.runs import announce, model, rows

WORLD = 2


@dataclass(frozen=True)
class FsdpRun:
    """A training.

    Attributes:
        directory: The ``output_dir``; ``whole.pt`` beside it gets the state dict that the model ended with.
        form: The kind of state dict that is saved.
        version: Of FSDP.
    """

    directory: Path
    form: str
    version: int


def rank(run: FsdpRun, number: int, port: int) -> None:
    """Train three steps, and save as the Trainer does at the last of them."""
    announce(number, WORLD, port)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
    from transformers import Trainer, TrainingArguments

    class OnCpu(Trainer):
        def create_accelerator_and_postprocess(self) -> None:
            super().create_accelerator_and_postprocess()
            self.fsdp_plugin = FullyShardedDataParallelPlugin(**self.args.fsdp_plugin_args)
            self.as_fsdp()

        def as_fsdp(self) -> None:
            state = self.accelerator.state
            state.distributed_type, state.fsdp_plugin = DistributedType.FSDP, self.fsdp_plugin
            state.device = torch.device("cpu")
            self.is_fsdp_enabled = True

        def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
            self.as_fsdp()  # the state that accelerate shares was made anew since
            super().save_model(output_dir, _internal_call)

    layers = {"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}
    args = TrainingArguments(
        output_dir=str(run.directory),
        learning_rate=2e-3,
        per_device_train_batch_size=2,
        max_steps=3,
        save_steps=3,
        fsdp=True,
        fsdp_config={"version": run.version, "state_dict_type": run.form, "sync_module_states": False, **layers},
        use_cpu=True,
        disable_tqdm=True,
        report_to="none",
    )
    copy_what_is_gathered()
    trainer = OnCpu(model=model(dropout=0.0), args=args, train_dataset=rows(16, 1))
    trainer.train()
    whole = gathered(trainer.model_wrapped if run.version == 1 else trainer.model)
    if number == 0:
        torch.save(whole, run.directory.parent / "whole.pt")
    dist.destroy_process_group()


def copy_what_is_gathered() -> None:
    """Let FSDP1 copy what it gathers: from the CPU to the CPU it does not, and lets go of the memory then."""
    from torch.distributed.fsdp import StateDictConfig

    StateDictConfig.offload_to_cpu = property(lambda config: False, lambda config, value: None)  # type: ignore[assignment]


def gathered(trained: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The state dict of a trained model, by torch."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    return dict(get_model_state_dict(trained, options=StateDictOptions(full_state_dict=True, cpu_offload=True)))
