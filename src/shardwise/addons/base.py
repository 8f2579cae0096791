"""The protocol of addons: two hooks around the writing of a model, and their arguments."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol, TypedDict, Unpack, runtime_checkable

if TYPE_CHECKING:
    import os

    from torch.distributed import ProcessGroup

    from shardwise.comm import Group
    from shardwise.stateful_wrappers import ModelState


class SavesPretrained(Protocol):
    """A tokenizer or processor: anything that writes itself into a directory."""

    def save_pretrained(self, save_directory: str | os.PathLike[str], /) -> object:
        """Write the files from which ``from_pretrained`` rebuilds the object."""


class SaveHookArgs(TypedDict, total=False):
    """Arguments of the hooks. All are optional, so that addons of one release run under the engine of another.

    Attributes:
        model_state: The model as this rank holds it.
        hf_metadata_dir: ``<weights_path>/model/.hf_metadata``, or ``None`` where no metadata is kept.
        consolidated_path: ``<weights_path>/model/consolidated``, or ``None`` where nothing is exported.
        model_path: ``<weights_path>/model``.
        tokenizer: A tokenizer or a processor.
        peft_config: The adapter's configuration.
        original_model_path: The base model: a local directory, a single local file, or a hub id.
        fqn_to_file_index_mapping: Name in the file -> number of the file (from 1) that holds the tensor.
        fqn_to_dtype_mapping: Name in the file -> dtype as written (a safetensors code or torch's name).
        v4_compatible: Write for readers of the 4.x generation of transformers too.
        diffusers_compatible: Write for ``diffusers``.
        group: The ranks that save together; ``None`` means the default process group.
        legacy_paramwrapper_layout: Write expert adapters for peft up to 0.19.0.
        is_final_checkpoint: Whether this is the run's last save.
        pp_group: The ranks of this pipeline, as `shardwise.config.CheckpointingConfig.build` was given it.
    """

    model_state: ModelState
    hf_metadata_dir: str | None
    consolidated_path: str | None
    model_path: str
    tokenizer: SavesPretrained | None
    peft_config: object | None
    original_model_path: str | None
    fqn_to_file_index_mapping: Mapping[str, int] | None
    fqn_to_dtype_mapping: Mapping[str, str] | None
    v4_compatible: bool
    diffusers_compatible: bool
    group: Group | None
    legacy_paramwrapper_layout: bool
    is_final_checkpoint: bool
    pp_group: ProcessGroup | None


@runtime_checkable
class CheckpointAddon(Protocol):
    """Optional hooks that run around the writing of a model.

    The engine calls, on every rank of the group and in this order:

    1. `pre_save`, before the first byte of the weights is written, while the model may be read;
    2. `post_save`, when every byte of the weights is durable and before the checkpoint is published. In asynchronous
       mode the model has moved on by then, so this hook must not read it: ``model_state`` has the modules, and raises
       `MisuseError` where it is asked for values.

    Every rank has the same addons, in the same order. An addon writes on rank 0 of the group, inside
    ``group.together(...)``, so that all ranks leave together and a failure of one is raised on all.
    """

    def pre_save(self, **kwargs: Unpack[SaveHookArgs]) -> None:
        """Write what goes beside the weights. All ranks call."""

    def post_save(self, **kwargs: Unpack[SaveHookArgs]) -> None:
        """Finish, now that the weights are durable. All ranks call."""
