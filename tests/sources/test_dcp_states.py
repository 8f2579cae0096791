"""What a DCP directory holds beside a model."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp

from shardwise.sources.dcp_states import scheduler_places
from shardwise.sources.dcp_values import DcpValues


def test_schedulers_of_several_lists_are_in_the_order_of_the_file(tmp_path: Path) -> None:
    """Of classes that are not torch's: their places were in the order of a set, another in each process."""
    names = [f"{letter}_scheduler" for letter in "qwertyuiopasdfgh"]
    state: dict[str, object] = {name: [{"calls": number}] for number, name in enumerate(names)}
    dcp.save({"model": {"w": torch.ones(2)}, **state}, checkpoint_id=tmp_path, no_dist=True)
    values = DcpValues(tmp_path)
    order = list(dict.fromkeys(path[0] for path in values.paths.values() if path[0] != "model"))
    assert sorted(map(str, order)) == sorted(names)
    assert scheduler_places(values) == [(name, 0) for name in order]
