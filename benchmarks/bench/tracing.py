"""What a trace costs: saves of many small tensors, with and without."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from bench.measure import Row, Samples, measure
from bench.ranks import Rank, Settings, run_ranks
from bench.saving import removed
from shardwise import Checkpointer, CheckpointingConfig

_TENSORS = 40_000
_SHAPE = (4, 64)


def tracing(settings: Settings) -> list[Row]:
    """Time whole saves that write a trace against saves that do not, in turns."""
    return run_ranks(_tracing, settings)


def _tracing(rank: Rank) -> list[Row]:
    mesh = init_device_mesh("cpu", (rank.world_size,), mesh_dim_names=("dp",))
    model = nn.ParameterList(
        nn.Parameter(distribute_tensor(torch.zeros(_SHAPE), mesh, [Shard(0)])) for _ in range(_TENSORS)
    )
    traces = rank.directory / "traces"
    plain, traced = (_checkpointer(rank, trace) for trace in (None, traces))
    samples = Samples()
    with plain, traced:
        # Each has planned once before it is measured.
        for step in range(rank.settings.repeats + 1):
            reference = measure(lambda step=step: plain.save(step=step, model=model))  # type: ignore[misc]
            sample = measure(lambda step=step: traced.save(step=step, model=model))  # type: ignore[misc]
            if step:
                samples.reference.append(reference)
                samples.measured.append(sample)
            for each in (plain, traced):
                removed(rank, each.config.checkpoint_dir / f"epoch_0_step_{step}")
    size = sum(file.stat().st_size for file in traces.iterdir()) / len(list(traces.iterdir()))
    nbytes = _TENSORS * 4 * _SHAPE[0] * _SHAPE[1]
    note = f"{_TENSORS:,} tensors; a rank's trace has {size / (rank.settings.repeats + 1) / 1e3:.1f} kB for each save"
    return [samples.row("save with a trace", "without", None, nbytes, note=note)]


def _checkpointer(rank: Rank, trace: object) -> Checkpointer:
    directory = rank.directory / ("traced" if trace else "plain")
    config = CheckpointingConfig(checkpoint_dir=directory, save_consolidated="every", trace=trace, log_summary=False)
    return config.build()
