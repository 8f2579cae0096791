"""Draws the traces of a directory as a picture: ``python -m tools.draw_trace TRACES PICTURE``. Needs matplotlib.

``python -m tools.draw_trace --make TRACES`` makes a directory of traces first: two ranks, an asynchronous save of a
small model with its optimizer, and its restore.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Bar:
    """A span of a trace; times in milliseconds."""

    row: tuple[int, str]
    name: str
    begin: float
    length: float
    depth: int


def bars(directory: Path, calls: tuple[str, ...]) -> list[Bar]:
    """The spans of the last call of each name in ``calls``, of every rank, one call after the other."""
    found: list[Bar] = []
    events = [event for file in sorted(directory.glob("*.json")) for event in json.loads(file.read_text())]
    names = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"}
    spans = [event for event in events if event["ph"] == "X"]
    offset = 0.0
    for call in calls:
        own = {e["pid"]: e for e in spans if e["name"] == call and e["tid"] == 0}
        start = min(e["ts"] for e in own.values())
        for rank, whole in sorted(own.items()):
            end = whole["ts"] + whole["dur"]
            inside = [e for e in spans if e["pid"] == rank and whole["ts"] - 5 <= e["ts"] <= end]
            for event in inside:
                within = [
                    e
                    for e in inside
                    if e is not event
                    and e["tid"] == event["tid"]
                    and e["ts"] <= event["ts"]
                    and e["ts"] + e["dur"] >= event["ts"] + event["dur"]
                ]
                row = (rank, names[rank, event["tid"]])
                begin = offset + (event["ts"] - start) / 1e3
                found.append(Bar(row, event["name"], begin, event["dur"] / 1e3, min(len(within), 3)))
        offset += max((e["ts"] + e["dur"] - start) / 1e3 for e in own.values()) * 1.05
    return found


def draw(found: list[Bar], picture: Path) -> None:
    """Draw the bars: a row for each thread of each rank, spans inside others thinner."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "shardwise"  # the same picture of the same trace
    matplotlib.rcParams["svg.fonttype"] = "none"  # text that can be searched
    from matplotlib import pyplot

    rows = sorted({bar.row for bar in found}, key=lambda row: (row[0], row[1] != "calls", row[1]))
    names = list(dict.fromkeys(bar.name for bar in found))
    colours = pyplot.get_cmap("tab20")
    figure, axes = pyplot.subplots(figsize=(11, 1.2 + 0.5 * len(rows)))
    for bar in sorted(found, key=lambda each: each.depth):
        height = 0.8 - 0.2 * bar.depth
        axes.barh(
            rows.index(bar.row),
            bar.length,
            left=bar.begin,
            height=height,
            color=colours(names.index(bar.name) % 20),
            edgecolor="white",
            linewidth=0.3,
        )
    longest = max(bar.begin + bar.length for bar in found)
    for bar in found:
        if bar.length > 0.06 * longest and bar.depth < 2:
            left = bar.begin + 0.005 * longest
            axes.text(left, rows.index(bar.row), bar.name, ha="left", va="center", fontsize=7)
    axes.set_yticks(range(len(rows)), [f"rank {rank}: {thread}" for rank, thread in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds")
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=colours(number % 20)) for number in range(len(names))]
    axes.legend(handles, names, ncols=9, fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.15))
    figure.savefig(picture, bbox_inches="tight", metadata={"Date": None})


def save_and_restore(directory: str) -> None:
    """On each rank: two asynchronous saves and a restore, traced."""
    import tempfile

    import torch
    import torch.distributed as dist
    from torch import nn
    from torch.distributed.fsdp import fully_shard

    from shardwise import CheckpointingConfig

    model = fully_shard(nn.Sequential(*[nn.Linear(1024, 1024) for _ in range(12)]))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 1024)).sum().backward()
    optimizer.step()
    roots = [tempfile.mkdtemp() if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(roots)
    config = CheckpointingConfig(
        checkpoint_dir=roots[0], is_async=True, save_consolidated="every", max_recent_checkpoints=1, trace=directory
    )
    with config.build() as checkpointer:
        for step in (1, 2):
            checkpointer.save(step=step, model=model, optimizer=optimizer)
            checkpointer.async_wait()
        checkpointer.restore(model, optimizer)


def main() -> None:
    """Read the arguments and draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--make", action="store_true", help="make the traces first")
    parser.add_argument("traces", type=Path)
    parser.add_argument("picture", type=Path, nargs="?")
    given = parser.parse_args()
    if given.make:
        from tests.support.ranks import run
        from tools.draw_trace import save_and_restore as work  # under the name by which ranks can import it

        run(2, work, str(given.traces.absolute()), seconds=300)
    if given.picture is not None:
        draw(bars(given.traces, ("save", "restore")), given.picture)


if __name__ == "__main__":
    main()
