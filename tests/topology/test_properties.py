"""Random tensors from random ranks to random others, in memory and without processes."""

from __future__ import annotations

from pathlib import Path

from hypothesis import example, given, settings
from hypothesis import strategies as st
from tests.support.memory import MemoryStorage
from tests.support.simulate import DTYPES, Simulation, Spread, ThreadGroup, in_threads, placements, raw

from shardwise.engine.export import exchange_rows
from shardwise.engine.writer import Digests, FileSet, write_all
from shardwise.geometry import Box, TensorSpec
from shardwise.plan.layout import lay_out
from shardwise.plan.placement import Replicated, Sharded, Strided
from shardwise.plan.reads import SourceChunk, SourceTensor, plan_reads
from shardwise.plan.schedule import WriteRun, plan_shards, schedule
from shardwise.sources.reader import SMALL_GAP_BYTES, Reader

ROOT = Path("/memory")
#: Primes, ones and nothing; tensors without a dimension come from the empty list.
shapes = st.lists(st.sampled_from([0, 1, 1, 2, 3, 5, 7, 11, 13]), max_size=4).map(tuple)
meshes = (
    st.lists(st.integers(1, 4), min_size=1, max_size=3).map(tuple).filter(lambda mesh: len(mesh) < 3 or sum(mesh) < 8)
)

Pair = tuple[Simulation, Simulation]


@st.composite
def pairs(draw: st.DrawFn) -> Pair:
    """The same tensors on two topologies."""
    specs = [
        TensorSpec(f"t{number}", draw(shapes), draw(st.sampled_from(DTYPES)))
        for number in range(draw(st.integers(1, 4)))
    ]

    def spread() -> Simulation:
        mesh = draw(meshes)
        return Simulation(
            mesh,
            tuple(Spread(spec, draw(st.none() | placements(len(spec.shape), mesh))) for spec in specs),
        )

    return spread(), spread()


def one(shape: tuple[int, ...], mesh: tuple[int, ...], *kinds: Replicated | Sharded | Strided) -> Simulation:
    """One tensor on one topology."""
    return Simulation(mesh, (Spread(TensorSpec("t0", shape, "F32"), kinds),))


def exported(case: Simulation) -> tuple[MemoryStorage, list[SourceTensor], list[Path]]:
    """Every rank writes its part of the final files."""
    layout = lay_out(case.roster.specs, max_file_bytes=300)
    storage = MemoryStorage()
    paths = [ROOT / file.name for file in layout.files]
    for file, path in zip(layout.files, paths, strict=True):
        storage.create(path, file.size, file.header)

    def write(group: ThreadGroup) -> Exception | None:
        held = case.everyone[group.rank]
        plan = schedule(held, layout, case.roster, group.rank)
        files, digests = FileSet(storage, paths), Digests()

        def put(run: WriteRun) -> None:
            write_all([run], files, storage, 1, digests)

        write_all(plan.runs, files, storage, 1, digests)
        failure = exchange_rows(plan.exchanges, held, layout, group, put)
        files.close()
        return failure

    assert in_threads(case.world, write) == [None] * case.world
    places = layout.places
    sources = [
        SourceTensor(s, (SourceChunk(Box.whole(s.shape), places[s.name].file, places[s.name].offset),))
        for s in case.roster.specs
    ]
    return storage, sources, paths


def sharded(case: Simulation) -> tuple[MemoryStorage, list[SourceTensor], list[Path]]:
    """Every rank writes files of its own."""
    storage, paths = MemoryStorage(), []
    chunks: dict[str, list[SourceChunk]] = {spec.name: [] for spec in case.roster.specs}
    for rank in range(case.world):
        for file in plan_shards(case.everyone[rank], case.roster, rank):
            path = ROOT / file.layout.name
            assert path not in storage.files, "two ranks write one file"
            body = bytearray(file.layout.header)
            for entry in file.layout.entries:
                piece = file.pieces[entry.spec.name]
                chunks[entry.spec.name].append(SourceChunk(piece.box, len(paths), len(body)))
                body += raw(piece.data.reshape(piece.box.sizes))
            storage.files[path] = body
            paths.append(path)
    return storage, [SourceTensor(s, tuple(chunks[s.name])) for s in case.roster.specs], paths


def loaded(case: Simulation, storage: MemoryStorage, sources: list[SourceTensor], paths: list[Path]) -> None:
    """Every rank reads its part, and not much more, into zeros; compare."""
    for rank in range(case.world):
        held = case.held(rank, empty=True)
        for tensor, source in zip(held, sources, strict=True):
            assert tensor.spec == source.spec
            seen: list[tuple[int, int, int]] = []
            reader = Reader(storage, paths, observe=lambda file, at, n, seen=seen: seen.append((file, at, n)))  # type: ignore[misc]
            reads = list(plan_reads(source, tensor))
            reader.execute(reads)
            reader.close()
            wanted = sum(fragment.box.numel for fragment in tensor.fragments) * tensor.spec.itemsize
            assert reader.counts.wanted == wanted
            rows = sum(getattr(read, "rows", 1) for read in reads)
            assert wanted <= reader.counts.read <= wanted + rows * SMALL_GAP_BYTES
        for mine, theirs in zip(held, case.everyone[rank], strict=True):
            for a, b in zip(mine.fragments, theirs.fragments, strict=True):
                assert a.box == b.box
                assert raw(a.data) == raw(b.data)


TP, OTHER = Sharded(0), Sharded(1)
PACKED = Strided(0, 2)


@settings(max_examples=60)
@given(pairs())
@example((one((7, 3), (3, 2), Strided(0, 2), TP), one((7, 3), (4,), OTHER)))  # FSDP2 over TP, unevenly
@example((one((22, 3), (2, 2), Strided(0, 2), PACKED), one((22, 3), (2, 2), TP, PACKED)))  # FSDP2 over packed TP
@example((one((5, 3), (2, 2, 2), Replicated(), Strided(0, 2), TP), one((5, 3), (4,), PACKED)))  # HSDP over TP
def test_what_one_topology_exports_another_reads(pair: Pair) -> None:
    save, load = pair
    storage, sources, paths = exported(save)
    assert storage.open_handles == 0
    for tensor, whole in zip(save.tensors, save.wholes, strict=True):
        [chunk] = next(s.chunks for s in sources if s.spec == tensor.spec)
        assert bytes(storage.files[paths[chunk.file]][chunk.offset :][: tensor.spec.nbytes]) == raw(whole)
    loaded(load, storage, sources, paths)


@settings(max_examples=60)
@given(pairs())
@example((one((22, 3), (2, 2), Strided(0, 2), PACKED), one((22, 3), (3,), TP)))
def test_what_one_topology_writes_as_shards_another_reads(pair: Pair) -> None:
    save, load = pair
    storage, sources, paths = sharded(save)
    loaded(load, storage, sources, paths)
