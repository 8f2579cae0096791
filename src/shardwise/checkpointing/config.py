"""`CheckpointingConfig`: the `shardwise.settings.Settings` that make a checkpointer.

The checkpointer reads settings and does not import this module.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from shardwise.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

    from shardwise.checkpointing.checkpointer import Checkpointer
    from shardwise.timing import Callback


class CheckpointingConfig(Settings):
    """Everything that can be set about checkpointing, and `build`, which makes the engine from it.

    The fields are those of `shardwise.settings.Settings`.

    Examples:
        >>> config = CheckpointingConfig(checkpoint_dir="runs/one", save_consolidated="every", max_recent_checkpoints=3)
        >>> with config.build() as checkpointer:
        ...     resumed = checkpointer.restore(model, optimizer)
        ...     step = resumed.step + 1 if resumed else 1
        ...     path = checkpointer.save(step=step, model=model, optimizer=optimizer)
        >>> path.name
        'epoch_0_step_1'
    """

    def build(
        self,
        dp_rank: int | None = None,
        tp_rank: int | None = None,
        pp_rank: int | None = None,
        moe_mesh: DeviceMesh | None = None,
        process_group: ProcessGroup | None = None,
        pp_group: ProcessGroup | None = None,
        *,
        callbacks: Sequence[Callback] = (),
    ) -> Checkpointer:
        """Make the engine for this configuration; every rank calls it.

        The three ranks may be left out. They are derived from the model at its first save or restore: from the names of
        the dimensions of its tensors' meshes, pipeline stages also from ``pp_group`` or from the tensors that each rank
        has, data-parallel ranks also from the order of those that have the same. One process by itself is rank 0 of
        each. What is given has to be what the meshes say. Only `Checkpointer.save_on_dp_ranks` and its counterpart need
        them all, and ask for what cannot be derived.

        Args:
            dp_rank: This rank's data-parallel coordinate.
            tp_rank: This rank's tensor-parallel coordinate.
            pp_rank: This rank's pipeline stage.
            moe_mesh: Accepted for compatibility and kept as an attribute. It has no effect: the sharding
                of experts is read from their tensors.
            process_group: Ranks that save together; all ranks when not given.
            pp_group: Ranks that hold the stages of one model replica, in the order of the stages; addons are given it.
            callbacks: Called on every rank with the record of each save and load; see `Checkpointer`.

        Returns:
            The `shardwise.checkpointing.Checkpointer`.

        Raises:
            ConfigError: Settings that contradict each other; see `shardwise.checkpointing.Checkpointer`.
            StorageError: This process may not write to ``checkpoint_dir``.
            MisuseError: One of the ranks is no whole number from 0.
        """
        from shardwise.checkpointing.checkpointer import Checkpointer  # heavy, where a configuration by itself is cheap

        return Checkpointer(self, dp_rank, tp_rank, pp_rank, moe_mesh, process_group, pp_group, callbacks=callbacks)


# Whoever asks for help on the class that they build finds every field explained there.
_, _heading, _fields = (Settings.__doc__ or "").partition("    Attributes:")
CheckpointingConfig.__doc__ = f"{(CheckpointingConfig.__doc__ or '').rstrip()}\n\n{_heading}{_fields}"
