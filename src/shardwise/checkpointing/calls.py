"""What every call has around it: its storage, no inference mode and no collector; and that all ranks make the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import wraps
from typing import ParamSpec, Protocol, TypeVar, cast

import torch

from shardwise.comm import Group, JsonValue
from shardwise.disk.storage import Storage, using
from shardwise.engine.background import Background
from shardwise.engine.collector import without_collector
from shardwise.errors import MisuseError, ShardwiseError
from shardwise.timing import phase


@phase("agree")
def check_same_call(
    call: str, look: Callable[[], str], given: Mapping[str, bool], group: Group, note: JsonValue = None
) -> list[JsonValue]:
    """Check that all ranks make the same call with the same kinds of arguments; `MisuseError` if not. All ranks call.

    Every call begins with this exchange, so that two different calls that meet are named at once.

    Args:
        call: The method and its target, as messages show it: ``save(epoch_0_step_1)``.
        look: Checks this rank's arguments and returns what is saved; a constant text where that does not depend on
            the caller. An error on one rank is raised on all.
        given: Name of an optional argument that decides which collectives follow -> whether it was passed.
        group: The ranks that save or load together.
        note: Another value to gather from every rank; the notes are returned.
    """
    names = sorted(key for key, is_given in given.items() if is_given)
    with group.coming(call):
        rows = group.gather(
            lambda: [call, look(), cast(JsonValue, names), note], "looking at what is to be saved or loaded"
        )
    everyone = cast(list[tuple[str, str, list[str], JsonValue]], rows)
    first_call, first, passed, _ = everyone[0]
    for rank, (theirs, _, _, _) in enumerate(everyone):
        if theirs.partition("(")[0] != first_call.partition("(")[0]:
            raise MisuseError(
                f"rank 0 calls {first_call} and rank {rank} calls {theirs}",
                hint="Call the same methods on every rank, in the same order.",
            )
    for rank, (_, theirs, they_passed, _) in enumerate(everyone):
        if theirs != first:
            raise MisuseError(
                f"rank 0 saves {first} and rank {rank} saves {theirs}",
                hint="Count epochs and steps alike on every rank.",
            )
        if they_passed != passed:
            odd = sorted({*passed} ^ {*they_passed})[0]
            has, lacks = (0, rank) if odd in passed else (rank, 0)
            raise MisuseError(
                f"{odd} was passed on rank {has} and not on rank {lacks}",
                hint="Pass the same arguments on every rank; a rank without stages passes empty lists.",
            )
    return [note for _, _, _, note in everyone]


@dataclass(frozen=True, slots=True)
class Turn:
    """Whether a save is made, and the error of the previous save, the same on every rank.

    A save is skipped while the previous one is still being written, if the settings say not to wait for it.
    """

    skipped: bool = False
    earlier: ShardwiseError | None = None

    @contextmanager
    def raising_earlier(self, what: str, wait: Callable[[], None]) -> Iterator[None]:
        """Make a save, and then raise the error of the previous one.

        A user who has lost a checkpoint needs the next one all the more, so the new save is made durable before the
        error is raised: ``wait`` returns when it is.
        """
        earlier = self.earlier
        try:
            yield
            if earlier is not None:
                wait()
        except ShardwiseError as error:
            if earlier is not None:
                error.add_note(f"Before that, {earlier}")
            raise
        if earlier is not None:
            made = f"This one, of {what}, was made all the same and is published."
            earlier.hint = f"{made} {earlier.hint}" if earlier.hint else made
            raise earlier


def own_state(background: Background | None, waits: bool) -> JsonValue:
    """This rank's background thread, for `take_turn`: is it busy, is it broken, its error. Local.

    Where ``waits`` is true, the save that is being written is waited for.
    """
    if background is None:
        return [False, False, None]
    if background.busy and not waits:
        return [True, False, None]
    failure = background.outcome()
    return [False, background.is_broken, None if failure is None else cast(JsonValue, failure.to_record())]


def take_turn(states: list[JsonValue]) -> Turn:
    """Decide from the states of all ranks whether a save is made; the same on every rank.

    Raises the error of the previous save where it left the background unable to write another one.
    """
    everyone = cast(list[tuple[bool, bool, dict[str, str | int | None] | None]], states)
    records = [record for _, _, record in everyone if record is not None]
    earlier = None
    if records:
        earlier = ShardwiseError.from_record(records[0])
        earlier.message = f"an earlier save failed in the background: {earlier.message}"
        earlier.args = (earlier.message,)
    if any(is_broken for _, is_broken, _ in everyone):
        if earlier is None:
            earlier = MisuseError("the ranks have lost touch in an earlier save", hint="Restart the job.")
        earlier.message += "; its ranks have lost touch, and the save that was asked for now was not made"
        raise earlier
    return Turn(any(is_busy for is_busy, _, _ in everyone), earlier)


class HasStorage(Protocol):
    """Something whose calls have a storage."""

    @property
    def storage(self) -> Storage:
        """What they look at names in, and read from and write to."""
        ...


P = ParamSpec("P")
T = TypeVar("T")


@contextmanager
def undisturbed() -> Iterator[None]:
    """Run as outside of ``torch.inference_mode``, and without the collector.

    Every tensor that is made inside of that mode refuses for good to be changed in place outside of it: staging memory
    that the next save fills, an optimizer's state that the next step updates, a parameter that was given its memory.
    """
    is_inferring = torch.is_inference_mode_enabled()
    with without_collector(), torch.inference_mode(False) if is_inferring else nullcontext():
        yield


def public_call(function: Callable[P, T]) -> Callable[P, T]:
    """Let a method of something that `HasStorage` use that storage, and run it `undisturbed`."""

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        with using(cast(HasStorage, args[0]).storage), undisturbed():
            return function(*args, **kwargs)

    return call
