"""Every topology's checkpoint into every other topology: weights and AdamW states, bit for bit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch.distributed as dist
from tests.support.ranks import run
from tests.topology.exports import consolidated, export, tensors
from tests.topology.setups import EMBEDDING, FAMILIES, HEAD, Run, topologies

#: In a routine run each topology loads this share of the others' checkpoints, another share for each.
SHARE = 6


def save_all(family: str, root: Path) -> None:
    for topology in topologies(family):
        training = Run(family, topology)
        training.fill()
        training.save(root / topology.__name__, save_consolidated="every")
        dist.barrier()


def load_all(family: str, root: Path, wanted: Mapping[str, Sequence[str]]) -> int:
    """Load into each topology the checkpoints that ``wanted`` lists for it; returns how many."""
    count = 0
    for topology in topologies(family):
        training = Run(family, topology) if wanted.get(topology.__name__) else None
        for source in wanted.get(topology.__name__, ()):
            assert training is not None
            training.reset()
            try:
                training.restore(root / source)
                training.check()
            except Exception as error:
                raise AssertionError(f"saved on {source}, loaded on {topology.__name__}") from error
            count += 1
    return count


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of each family on each topology."""
    root = tmp_path_factory.mktemp("matrix")
    for family in FAMILIES:
        run(4, save_all, family, root / family, seconds=250)
    return root


def plan(family: str, routine: bool) -> dict[str, list[str]]:
    """The pairs of a run: the routine one, or all others."""
    names = [topology.__name__ for topology in topologies(family)]
    return {
        target: [source for j, source in enumerate(names) if ((i + j) % SHARE == 0) == routine]
        for i, target in enumerate(names)
    }


@pytest.mark.parametrize("routine", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["routine", "rest"])
@pytest.mark.parametrize("family", FAMILIES)
def test_any_topology_loads_any_others_checkpoint(family: str, routine: bool, saved: Path) -> None:
    wanted = plan(family, routine)
    pairs = sum(map(len, wanted.values()))
    assert run(4, load_all, family, saved / family, wanted, seconds=250) == [pairs] * 4


@pytest.mark.parametrize("family", FAMILIES)
def test_the_export_does_not_depend_on_the_topology(family: str, saved: Path) -> None:
    names = [topology.__name__ for topology in topologies(family)]
    found = {name: export(saved / family / name) for name in names}
    if family == "tied":
        # Two stages have a tensor each where one process has one; both are written.
        doubled = [name for name in names if name.startswith("pp")]
        single = tensors(consolidated(saved / family / "single"))
        assert len({tuple(sorted(found.pop(name).items())) for name in doubled}) == 1
        assert tensors(consolidated(saved / family / doubled[0])) == {**single, HEAD: single[EMBEDDING]}
    assert {name for name, files in found.items() if files != found["single"]} == set()
