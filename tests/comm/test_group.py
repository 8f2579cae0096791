"""Ranks that fail together: status, values, bytes and rows between real processes."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from tests.support.ranks import WORLDS, failure, outcomes, run

from shardwise.comm import Group
from shardwise.errors import PeerError, RemoteError, ShapeMismatchError, ShardwiseError, StorageError


def gather(length: int) -> list[object]:
    group = Group.current()
    value = {"rank": group.rank, "text": "é" * (length * group.rank)}
    return group.gather_json(value)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("length", [0, 3, 60, 75, 90, 235, 240, 250, 5000])  # one exchange of 512 bytes, or two
def test_gather_json_gives_every_value_in_rank_order(world: int, length: int) -> None:
    want = [{"rank": r, "text": "é" * (length * r)} for r in range(world)]
    assert run(world, gather, length) == [want] * world


def collect(length: int) -> list[object]:
    group = Group.current()
    return group.collect(lambda: {"rank": group.rank, "text": "é" * (length * group.rank)}, "collecting")


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("length", [0, 5000])
def test_collect_gives_every_value_in_rank_order_to_rank_0(world: int, length: int) -> None:
    want = [{"rank": r, "text": "é" * (length * r)} for r in range(world)]
    assert run(world, collect, length) == [want, *[[]] * (world - 1)]


def deal(length: int) -> list[bytes]:
    group = Group.current()
    messages = [f"{group.rank} to {other}".encode() * (length * other) for other in range(group.world_size)]
    return group.exchange(messages, "testing")


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("length", [0, 1, 5000])
def test_deal_brings_each_rank_what_is_for_it(world: int, length: int) -> None:
    want = [[f"{r} to {own}".encode() * (length * own) for r in range(world)] for own in range(world)]
    assert run(world, deal, length) == want


def attempt(method: str, length: int, failing: tuple[int, ...]) -> object:
    group = Group(dist.group.WORLD)

    def make() -> str:
        if group.rank in failing:
            raise StorageError(f"no {'é' * length}", path=Path("/far"), hint="Mount it again.")
        return f"{group.rank}" + "é" * length

    if method == "fold":
        refused: Exception | None = None
        try:
            made = len(make())
        except StorageError as error:
            made, refused = 0, error
        return group.fold([1 << group.rank], [made], "trying", refused)
    return getattr(group, method)(make, "trying")


@pytest.mark.parametrize("world", [1, 3])
@pytest.mark.parametrize("length", [0, 5000])
def test_values_that_are_made_arrive(world: int, length: int) -> None:
    want = [f"{rank}" + "é" * length for rank in range(world)]
    assert run(world, attempt, "gather", length, ()) == [want] * world
    assert run(world, attempt, "collect", length, ()) == [want, *[[]] * (world - 1)]
    assert run(world, attempt, "fold", length, ()) == [([2**world - 1], [world * (1 + length)])] * world


def fold_many(xors: int, sums: int, failing: int) -> tuple[bool, bool]:
    group = Group(dist.group.WORLD)
    refused = StorageError("no", path=Path("/far")) if group.rank == failing else None
    found = group.fold([(n + 1) << group.rank for n in range(xors)], [n + group.rank for n in range(sums)], "", refused)
    wanted = [(n + 1) ^ (n + 1) << 1 ^ (n + 1) << 2 for n in range(xors)], [3 * n + 3 for n in range(sums)]
    return found[0] == wanted[0], found[1] == wanted[1]


@pytest.mark.parametrize("xors", [0, 3, 9000])
@pytest.mark.parametrize("sums", [0, 3, 9000])
def test_few_integers_are_combined_as_many_are(xors: int, sums: int) -> None:
    assert run(3, fold_many, xors, sums, -1) == [(True, True)] * 3


@pytest.mark.parametrize("count", [0, 9000])
def test_many_integers_travel_with_a_failure_as_few_do(count: int) -> None:
    error = failure(3, fold_many, count, count, 1)
    assert isinstance(error, StorageError)
    assert error.rank == 1


@pytest.mark.parametrize("method", ["gather", "collect", "fold"])
@pytest.mark.parametrize(("world", "failing"), [(1, (0,)), (3, (0,)), (3, (1, 2)), (3, (0, 1, 2))])
@pytest.mark.parametrize("length", [0, 5000])
def test_a_value_that_one_rank_cannot_make_fails_on_all(
    method: str, world: int, failing: tuple[int, ...], length: int
) -> None:
    error = failure(world, attempt, method, length, failing)
    assert isinstance(error, StorageError)
    assert (error.rank, error.path) == (failing[0], "/far")
    assert error.message == f"no {'é' * length}"


def one_talks(talker: int) -> list[object]:
    group = Group.current()
    return group.gather_json("x" * 10_000 if group.rank == talker else None)


def test_one_long_value_among_short_ones_arrives() -> None:
    want = [None, None, "x" * 10_000, None]
    assert run(4, one_talks, 2) == [want] * 4


def broadcast(source: int) -> tuple[object, bytes]:
    group = Group.current()
    told = group.broadcast_bytes(json.dumps({"from": group.rank}).encode(), source, "testing")
    return json.loads(told), group.broadcast_bytes(
        b"" if group.rank == 0 else bytes([group.rank]) * 3, source, "testing"
    )


@pytest.mark.parametrize("source", [0, 2])
def test_broadcast_gives_the_value_of_the_source(source: int) -> None:
    data = b"" if source == 0 else bytes([source]) * 3
    assert run(3, broadcast, source) == [({"from": source}, data)] * 3


def fold() -> tuple[list[int], list[int], bool, bool]:
    group = Group.current()
    xors, sums = group.fold([1 << group.rank, 0xFFFFFFFF], [group.rank, 2**40], "testing")
    return xors, sums, group.any(group.rank == group.world_size - 1), group.any(False)


@pytest.mark.parametrize("world", WORLDS)
def test_fold_combines_by_exclusive_or_and_by_sum(world: int) -> None:
    bits = (1 << world) - 1
    full = 0xFFFFFFFF if world % 2 else 0
    want = ([bits, full], [world * (world - 1) // 2, world * 2**40], True, False)
    assert run(world, fold) == [want] * world


class Unread(torch.Tensor):
    """As an accelerator's: the exchange breaks when its result is read."""

    def tolist(self) -> list[int]:
        raise RuntimeError("connection closed by peer")


def fold_unread() -> None:
    group = Group.current()
    made = group._integers
    group._integers = lambda values: made(values).as_subclass(Unread)  # type: ignore[method-assign]
    group.fold([], [1] * 2**14, "counting", failure=StorageError("the disk is full", hint="Free space."))


def test_an_exchange_that_breaks_when_it_is_read_is_a_typed_error_too() -> None:
    for error in (outcome.error for outcome in outcomes(2, fold_unread)):
        assert isinstance(error, PeerError)
        assert "while counting" in str(error)
        assert "the disk is full" in str(error)


def fail_on(ranks: tuple[int, ...], kind: str) -> None:
    group = Group.current()
    with group.together("testing"):
        if group.rank in ranks:
            if kind == "ours":
                raise ShapeMismatchError("shapes differ", path=f"/file/{group.rank}", tensor="w", hint="Mend it.")
            if kind == "os":
                raise OSError(28, "No space left on device", "/disk")
            raise KeyError("who knows")


@pytest.mark.parametrize("world", WORLDS)
def test_an_error_of_one_rank_is_raised_on_every_rank(world: int) -> None:
    error = failure(world, fail_on, (world - 1,), "ours")
    assert isinstance(error, ShapeMismatchError)
    assert isinstance(error, ValueError)
    assert (error.tensor, error.path, error.rank) == ("w", f"/file/{world - 1}", world - 1)
    assert str(error).endswith("Mend it.")


def test_the_error_of_the_lowest_rank_wins_when_several_fail() -> None:
    found = outcomes(3, fail_on, (1, 2), "ours")
    # A rank that failed itself and is not the lowest raises the lowest's error all the same.
    assert [outcome.error.rank for outcome in found] == [1, 1, 1]


def test_errors_of_the_operating_system_keep_their_number() -> None:
    error = failure(2, fail_on, (1,), "os")
    assert isinstance(error, StorageError)
    assert error.errno == 28
    assert "/disk" in str(error)
    assert "disk is full" in str(error)


def test_errors_of_unknown_types_arrive_with_their_text() -> None:
    error = failure(2, fail_on, (0,), "other")
    assert isinstance(error, RemoteError)
    assert "who knows" in str(error)


def after_failure() -> bool:
    group = Group.current()
    try:
        fail_on((0,), "ours")
    except ShardwiseError:
        return group.any(group.rank == 1)
    return False


def test_a_group_works_on_after_a_failure() -> None:
    assert run(2, after_failure) == [True, True]


def ring() -> list[int]:
    group = Group.current()
    right, left = (group.rank + 1) % group.world_size, (group.rank - 1) % group.world_size
    got = [torch.zeros(3, dtype=torch.uint8), torch.zeros(1, dtype=torch.uint8)]
    # Two messages to one peer: they arrive in the order in which they are listed.
    sends = [(right, torch.full((3,), group.rank, dtype=torch.uint8)), (right, torch.tensor([9], dtype=torch.uint8))]
    group.swap(sends, [(left, got[0]), (left, got[1])], "testing")
    group.swap([], [], "nothing to do")
    return torch.cat(got).tolist()


@pytest.mark.parametrize("world", [2, 3, 4])
def test_swap_delivers_messages_in_order(world: int) -> None:
    assert run(world, ring) == [[(r - 1) % world] * 3 + [9] for r in range(world)]


def in_subgroup() -> tuple[int, int, list[object]] | None:
    half = dist.new_group([1, 3])
    if dist.get_rank() not in (1, 3):
        return None
    group = Group(half)
    return group.rank, group.global_rank, group.gather_json(group.global_rank)


def test_ranks_of_a_subgroup_are_its_own() -> None:
    assert run(4, in_subgroup) == [None, (0, 1, [1, 3]), None, (1, 3, [1, 3])]


def fail_in_subgroup() -> str | None:
    half = dist.new_group([1, 3])
    if dist.get_rank() not in (1, 3):
        return None
    group = Group(half)
    try:
        with group.together("testing"):
            if group.rank == 1:
                raise ValueError("no")
    except RemoteError as error:
        return str(error)
    return "nothing"


def test_errors_name_the_global_rank() -> None:
    found = run(4, fail_in_subgroup)
    assert found[0] is None
    assert found[1] == found[3]
    assert "rank 3" in str(found[1])


def dedicated() -> tuple[bool, bool]:
    group = Group.dedicated(None, 30)
    other = group.process_group is not dist.group.WORLD
    together = group.any(True)
    group.close()
    group.close()
    return other, together


@pytest.mark.parametrize("world", [1, 3])
def test_a_dedicated_group_has_the_same_ranks_and_closes_twice(world: int) -> None:
    assert run(world, dedicated) == [(True, True)] * world


def absent(directory: str) -> str:
    if dist.get_rank() == 0:
        try:
            Group.dedicated(None, 1.0)
        except PeerError as error:
            Path(directory, "over").touch()
            return error.message
    # This rank stays, and does not come.
    while not Path(directory, "over").exists():
        time.sleep(0.05)
    return ""


def test_a_rank_that_does_not_come_to_the_meeting_is_a_typed_error(tmp_path: Path) -> None:
    assert "while meeting" in str(run(2, absent, str(tmp_path))[0])


def no_group() -> list[object]:
    dist.destroy_process_group()
    group = Group.current()
    return [group.rank, group.world_size, group.gather_json(1), group.fold([3], [4], ""), group.global_ranks]


def test_without_a_process_group_there_is_one_rank() -> None:
    assert run(1, no_group) == [[0, 1, [1], ([3], [4]), (0,)]]


def tell_numbers(fails: bool) -> tuple[object, int]:
    group = Group(dist.group.WORLD)
    calls: list[int] = []

    def make() -> object:
        calls.append(group.rank)
        if fails:
            raise StorageError("the mount is gone", path=Path("/far"), hint="Mount it again.")
        return {"rank": group.rank, "all": [1, None, "ä"]}

    value = group.broadcast_result(make, "telling numbers")  # type: ignore[arg-type]
    return value, len(calls)


@pytest.mark.parametrize("world", [1, 3])
def test_what_rank_0_makes_is_told_to_all(world: int) -> None:
    assert run(world, tell_numbers, False) == [({"rank": 0, "all": [1, None, "ä"]}, int(r == 0)) for r in range(world)]


@pytest.mark.parametrize("world", [1, 3])
def test_what_rank_0_cannot_make_fails_on_all(world: int) -> None:
    error = failure(world, tell_numbers, True)
    assert isinstance(error, StorageError)
    assert (error.rank, error.path) == (0, "/far")


def tell_what_is_no_json() -> None:
    Group(dist.group.WORLD).broadcast_result(lambda: {1, 2}, "telling a set")  # type: ignore[arg-type, return-value]


def test_what_cannot_be_told_fails_on_all() -> None:
    assert "set is not JSON serializable" in str(failure(2, tell_what_is_no_json))


def vote_of(yes: tuple[int, ...], fails: bool) -> bool:
    with Group(dist.group.WORLD).together("asking") as vote:
        vote.flag = dist.get_rank() in yes
        if fails and dist.get_rank() == 1:
            raise StorageError("no", path=Path("/x"))
    return vote.any


def test_a_question_travels_with_the_status() -> None:
    assert run(3, vote_of, (2,), False) == [True] * 3
    assert run(3, vote_of, (), False) == [False] * 3
    assert isinstance(failure(3, vote_of, (2,), True), StorageError)


def end_in_a_reducer(turns: int) -> int:
    """Destroy the default group where DDP's reducer is its last owner, right behind an exchange in it."""
    rank = dist.get_rank()
    dist.destroy_process_group()
    before = sys.getswitchinterval()
    sys.setswitchinterval(60)  # another thread gets Python's lock only where this one gives it up
    try:
        for turn in range(turns):
            meeting = f"file://{Path.cwd() / f'turn-{turn}'}"
            dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2)
            model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 2))
            Group.current().agree(None, "ending")
            dist.destroy_process_group()
            del model
    finally:
        sys.setswitchinterval(before)
    return turns


def test_no_thread_of_an_exchange_is_left_when_the_group_ends() -> None:
    """Without that the process stood still at its end: https://github.com/pytorch/pytorch/issues/56297."""
    assert run(2, end_in_a_reducer, 20) == [20, 20]
