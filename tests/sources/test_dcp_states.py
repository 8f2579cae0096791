"""What a DCP directory holds beside a model."""

from __future__ import annotations

from collections import Counter, OrderedDict
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp

from shardwise.sources.dcp_states import DcpGroup, DcpOptimizer, scheduler_places
from shardwise.sources.dcp_values import DcpValues
from shardwise.sources.state_files import joined, pack_state, split, unpack_state


def test_schedulers_of_several_lists_are_in_the_order_of_the_file(tmp_path: Path) -> None:
    """Of classes that are not torch's: their places were in the order of a set, another in each process."""
    names = [f"{letter}_scheduler" for letter in "qwertyuiopasdfgh"]
    state: dict[str, object] = {name: [{"calls": number}] for number, name in enumerate(names)}
    dcp.save({"model": {"w": torch.ones(2)}, **state}, checkpoint_id=tmp_path, no_dist=True)
    values = DcpValues(tmp_path)
    order = list(dict.fromkeys(path[0] for path in values.paths.values() if path[0] != "model"))
    assert sorted(map(str, order)) == sorted(names)
    assert scheduler_places(values) == [(name, 0) for name in order]


def test_an_optimizer_arrives_on_another_rank_as_it_was() -> None:
    """A counter arrived as the counts of its items, each one."""
    kept: dict[str, object] = {"counts": Counter(a=2, b=3), "size": torch.Size([2]), "order": OrderedDict(a=1)}
    sent = DcpOptimizer("optim", True, (DcpGroup({"lr": 0.1, **kept}, ("0",)),), {"0": {}}, {"0": kept}, True)
    assert DcpOptimizer.from_state(unpack_state(split(joined(pack_state(sent.to_state()))))) == sent
