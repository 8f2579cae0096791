"""Each optimizer of the table resumes bit for bit, or is refused by name: a few here, all of them in the slow run."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.optimizers import zoo
from tests.support.ranks import run

#: Those that were lost, refused, or came back as something else, one of each kind.
FAST = [
    "MADGRAD, layout",
    "SOAP, layout",
    "Shampoo, layout",
    "state that is a tensor; tuple keys",
    "Lookahead",
    "averaged weights, no Optimizer",
    "SAM",
    "container (torchtitan's form)",
    "hooks on the state dict",
    "overridden state_dict",
]
FAST_RANKS = ["ZeroRedundancyOptimizer", "PostLocalSGDOptimizer"]
FAST_SHARDED = [
    "SOAP, layout",
    "Shampoo, layout",
    "factored moments",
    "Prodigy, layout",
    "to_local() states",
    "a vector for each shard",
    "bitsandbytes 8-bit, layout",
    "state that is a tensor; tuple keys",
    "averaged weights, no Optimizer",
    "Lookahead",
]
#: What depends on the shards that there were, and is refused on others.
OF_SHARDS = {"a vector for each shard", "bitsandbytes 8-bit, layout", *(n for n in zoo.ROWS if "torchao" in n)}
MODES = [pytest.param(False, id="sync"), pytest.param(True, id="async")]


def _named(names: list[str], spread: str) -> list[str]:
    return [name for name in names if spread in zoo.ROWS[name].runs and zoo.ROWS[name].is_here]


def _all_resumed(names: list[str], spread: str, is_async: bool, root: str) -> dict[str, str]:
    return {name: zoo.resumed(name, spread, is_async, f"{root}/{number}") for number, name in enumerate(names)}


def _all_saved(names: list[str], is_async: bool, root: str) -> dict[str, str]:
    return {name: zoo.saved(name, is_async, f"{root}/{number}") for number, name in enumerate(names)}


def _all_moved(names: list[str], root: str) -> dict[str, str]:
    return {name: zoo.moved(name, f"{root}/{number}") for number, name in enumerate(names)}


@pytest.mark.parametrize("is_async", MODES)
def test_in_one_process(tmp_path: Path, is_async: bool) -> None:
    names = _named(FAST, zoo.SINGLE)
    assert _all_resumed(names, zoo.SINGLE, is_async, str(tmp_path)) == dict.fromkeys(names, "exact")


def test_replicated(tmp_path: Path) -> None:
    names = _named(FAST_RANKS, zoo.DDP)
    found = run(2, _all_resumed, names, zoo.DDP, False, str(tmp_path))
    assert found == [dict.fromkeys(names, "exact")] * 2


def test_sharded(tmp_path: Path) -> None:
    names = _named(FAST_SHARDED, zoo.FSDP)
    found = run(2, _all_resumed, names, zoo.FSDP, True, str(tmp_path))
    assert found == [dict.fromkeys(names, "exact")] * 2


def test_on_other_ranks(tmp_path: Path) -> None:
    names = _named(FAST_SHARDED, zoo.FSDP)
    assert run(2, _all_saved, names, False, str(tmp_path)) == [dict.fromkeys(names, "saved")] * 2
    for found in run(3, _all_moved, names, str(tmp_path)):
        for name in names:
            if name in OF_SHARDS:
                assert found[name].startswith("refused: each shard of this parameter has a state of its own")
            else:
                assert found[name] == "exact", name


@pytest.mark.slow
@pytest.mark.parametrize("is_async", MODES)
@pytest.mark.parametrize("spread", [zoo.SINGLE, zoo.DDP, zoo.FSDP])
@pytest.mark.parametrize("name", list(zoo.ROWS))
def test_every_one(tmp_path: Path, name: str, spread: str, is_async: bool) -> None:
    row = zoo.ROWS[name]
    if not row.is_here or spread not in row.runs:
        pytest.skip("not installed, or does not run there")
    if spread == zoo.SINGLE:
        found = [zoo.resumed(name, spread, is_async, str(tmp_path))]
    else:
        found = run(2, zoo.resumed, name, spread, is_async, str(tmp_path))  # type: ignore[assignment]
    assert set(found) == {"exact"}


@pytest.mark.slow
@pytest.mark.parametrize("is_async", MODES)
@pytest.mark.parametrize("name", [name for name, row in zoo.ROWS.items() if zoo.FSDP in row.runs])
def test_every_one_on_other_ranks(tmp_path: Path, name: str, is_async: bool) -> None:
    if not zoo.ROWS[name].is_here:
        pytest.skip("not installed")
    assert set(run(2, zoo.saved, name, is_async, str(tmp_path))) == {"saved"}
    for found in run(3, zoo.moved, name, str(tmp_path)):
        if name in OF_SHARDS:
            assert str(found).startswith("refused: each shard of this parameter has a state of its own")
        else:
            assert found == "exact"
