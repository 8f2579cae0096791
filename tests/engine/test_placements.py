"""Any placement: packed, uneven, empty and column shards of every dtype, from any number of ranks to any other."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from safetensors.torch import load_file
from tests.engine.bags import LINE, Bag, spreads_for
from tests.engine.setups import checkpointer
from tests.support.ranks import WORLDS, run
from tests.support.simulate import raw, values

from shardwise.disk.crc import crc32c
from shardwise.format.manifest import TensorRecord, read_manifest


def save(root: Path, world: int) -> None:
    for number, spreads in enumerate(spreads_for(world)):
        model = Bag(spreads, filled=True)
        settings = {
            "every": {"save_consolidated": "every"},
            "split": {"save_consolidated": "every", "max_file_bytes": 50_000, "io_threads": 3},
            "shards": {"save_consolidated": "false"},
            "merged": {"save_consolidated": "every", "random_writes": False},
            "staged": {
                "save_consolidated": "every",
                "single_rank_consolidation": True,
                "staging_dir": str(root / "staging"),
                "max_file_bytes": 50_000,
            },
        }
        for name, chosen in settings.items():
            with checkpointer(root / f"{name}-{world}-{number}", **chosen) as engine:
                engine.save(0, 0, model)


def load(roots: list[Path], world: int) -> list[list[str]]:
    wrong = []
    for root in roots:
        for spreads in spreads_for(world):
            model = Bag(spreads, filled=False)
            with checkpointer(root) as engine:
                engine.restore(model)
            wrong.append(model.wrong())
    return wrong


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("placements")
    for world in WORLDS:
        run(world, save, root, world)
    return root


def checkpoints(root: Path, kind: str) -> list[Path]:
    found = sorted(root.glob(f"{kind}-*"))
    assert len(found) == 5  # worlds 1 to 4, and two rows of two
    return found


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("kind", ["every", "shards"])
def test_every_bit_comes_back_on_any_number_of_ranks(saved: Path, world: int, kind: str) -> None:
    for wrong in run(world, load, checkpoints(saved, kind), world):
        assert not any(wrong)  # type: ignore[call-overload]


def digests(directory: Path) -> dict[str, str]:
    files = sorted(p for p in directory.rglob("*") if p.is_file() and p.suffix in (".safetensors", ".json"))
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.mark.parametrize(("kind", "same"), [("every", "every"), ("merged", "every"), ("staged", "split")])
def test_the_files_are_the_same_whoever_wrote_them_and_however(saved: Path, kind: str, same: str) -> None:
    where = "epoch_0_step_0/model/consolidated"
    want = digests(checkpoints(saved, same)[0] / where)
    assert len(want) == (2 if same == "every" else len(want))
    for root in checkpoints(saved, kind):
        assert digests(root / where) == want
        assert not list(root.rglob("shard-*"))
        assert not list(root.rglob(".merging"))
    assert not list((saved / "staging").iterdir())


@pytest.mark.parametrize("kind", ["every", "split"])
def test_any_reader_finds_the_bits(saved: Path, kind: str) -> None:
    for root in checkpoints(saved, kind):
        found: dict[str, bytes] = {}
        for file in (root / "epoch_0_step_0/model/consolidated").glob("*.safetensors"):
            found |= {name: raw(tensor) for name, tensor in load_file(file).items()}
        assert found == {spread.spec.name: raw(values(spread.spec, number)) for number, spread in enumerate(LINE)}


def tensors(root: Path) -> dict[str, TensorRecord]:
    return {tensor.spec.name: tensor for tensor in read_manifest(root / "epoch_0_step_0/manifest.json").tensors}


WANT = {spread.spec.name: values(spread.spec, number) for number, spread in enumerate(LINE)}


def test_digests_do_not_depend_on_ranks_placements_or_files(saved: Path) -> None:
    want = {name: crc32c(raw(value)) for name, value in WANT.items()}
    for kind in ("every", "split", "merged", "staged"):
        for root in checkpoints(saved, kind):
            assert {name: tensor.crc32c for name, tensor in tensors(root).items()} == want


def test_each_piece_in_shards_has_the_digest_of_its_values(saved: Path) -> None:
    for root in checkpoints(saved, "shards"):
        found = tensors(root)
        assert found.keys() == WANT.keys()
        for name, tensor in found.items():
            for chunk in tensor.chunks:
                box = tuple(slice(*ends) for ends in zip(chunk.box.offsets, chunk.box.ends, strict=True))
                assert chunk.crc32c == crc32c(raw(WANT[name][box])), (root.name, chunk)


def test_a_rank_writes_no_file_of_another(saved: Path) -> None:
    for root in checkpoints(saved, "shards"):
        manifest = read_manifest(root / "epoch_0_step_0/manifest.json")
        names = [file.path for file in manifest.files if "shard-" in file.path]
        assert len(names) == len(set(names))
    # Two regions of one tensor are in two files, since a reader of torch's knows one region of a tensor in a file.
    assert list(saved.glob("shards-3-0/*/model/shard-00004-*.safetensors"))
