"""A second model in a checkpoint: the moving average of the first, saved and exported as the first is.

It is saved in ``model_ema/`` as the model is in ``model/``, under the same names. What a wrapper such as torch's
``AveragedModel`` keeps beside the model, ``n_averaged`` above all, is in ``model_ema/averaging``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from shardwise.checkpointing.loading.restoring import Undos
from shardwise.disk.names import is_directory
from shardwise.disk.storage import Storage
from shardwise.engine.records import ComponentRecord, Step, local_step, write_state
from shardwise.errors import CheckpointNotFoundError, MisuseError, StateFormatError
from shardwise.sources.state_files import has_state, pack_state, read_state
from shardwise.stateful_wrappers.wrapping import unwrap

MODEL_EMA = "model_ema"
_AVERAGING = "averaging"


@dataclass(frozen=True, slots=True)
class Average:
    """An averaged model without its wrapper; ``beside`` has views of its parts' wrappers' tensors."""

    model: nn.Module | list[nn.Module]
    beside: Mapping[str, Sequence[torch.Tensor]]

    @staticmethod
    def of(ema: nn.Module | Sequence[nn.Module]) -> Average:
        """Take the wrappers off; `MisuseError` if a wrapper has state that is not a plain tensor. Local."""
        parts = [ema] if isinstance(ema, nn.Module) else list(ema)
        beside: dict[str, list[torch.Tensor]] = {}
        models = []
        for part in parts:
            wrapper = unwrap(part)
            if not isinstance(wrapper, AveragedModel):
                models.append(part)
                continue
            models.append(wrapper.module)
            for name, value in (*wrapper.named_parameters(), *wrapper.named_buffers()):
                if name.startswith("module."):
                    continue
                if type(value) not in (torch.Tensor, nn.Parameter):
                    raise MisuseError(
                        f"the wrapper of the averaged model keeps {name!r} as {type(value).__name__}",
                        hint="Pass the averaged model itself as ema, and the rest as extra_state.",
                    )
                beside.setdefault(name, []).append(value.detach())
        return Average(models[0] if isinstance(ema, nn.Module) else models, beside)

    def capture(self, directory: Path, storage: Storage) -> list[Step]:
        """Capture the wrappers' tensors now and return the steps that write them below ``directory``. Local."""
        for name, values in self.beside.items():
            first, *others = (value.cpu() for value in values)  # parts may be on devices of their own
            if not all(torch.equal(first, other) for other in others):
                raise MisuseError(
                    f"the wrappers of the averaged model's parts have different values of {name}",
                    hint="Update the averages of all parts together.",
                )
        packed = pack_state({name: values[0] for name, values in self.beside.items()}) if self.beside else {}

        def write() -> ComponentRecord:
            if not packed:
                return ComponentRecord()
            own = directory / _AVERAGING  # tensor files beside the model's would be read as the model's
            storage.make_directory(own)
            record = write_state(storage, own / _AVERAGING, packed).below(_AVERAGING)
            storage.sync_directory(own)
            return record

        return [local_step("writing the state of the averaged model's wrapper", write, main_only=True)]

    def find(self, directory: Path) -> Mapping[str, torch.Tensor]:
        """Read the wrappers' saved tensors, by name, and compare them; an error if they are absent. Local."""
        if not is_directory(directory):
            raise CheckpointNotFoundError(
                "the checkpoint was saved without an ema",
                path=directory,
                hint="Restore without ema and start the average from the model, or choose a checkpoint that has one.",
            )
        stem = directory / _AVERAGING / _AVERAGING
        if not self.beside:
            return {}
        if not has_state(stem):
            raise CheckpointNotFoundError(
                f"the checkpoint has no {min(self.beside)} of the averaged model: it was saved without a wrapper",
                path=stem.with_name(f"{_AVERAGING}.json"),
                hint="Restore into the averaged model itself (averaged.module) and set the count by hand.",
            )
        saved = read_state(stem)
        if not isinstance(saved, dict) or not all(isinstance(each, torch.Tensor) for each in saved.values()):
            raise StateFormatError("this is not what an averaged model keeps", path=f"{stem}.json")
        for name, values in self.beside.items():
            if name not in saved or any(saved[name].shape != value.shape for value in values):
                raise StateFormatError(
                    f"the checkpoint's {name} is not what the averaged model has",
                    path=f"{stem}.json",
                    hint="Build the averaged model as it was when the checkpoint was saved.",
                )
        return cast("dict[str, torch.Tensor]", saved)

    def take_in(self, saved: Mapping[str, torch.Tensor], undos: Undos) -> None:
        """Put saved values into the wrappers' tensors. Local."""
        had = {name: [value.clone() for value in values] for name, values in self.beside.items()}

        def put(found: Mapping[str, Sequence[torch.Tensor]]) -> None:
            with torch.no_grad():
                for name, values in self.beside.items():
                    for value, new in zip(values, found[name], strict=True):
                        value.copy_(new)

        undos.add("the averaged model's count", lambda: put(had))
        put({name: [saved[name]] * len(values) for name, values in self.beside.items()})
