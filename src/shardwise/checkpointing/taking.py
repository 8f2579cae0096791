"""Loading what modules take by their own methods: what there is for them, and calling them in torch's order."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import nn

from shardwise.checkpointing.aside import SavedAside, read_aside
from shardwise.checkpointing.hub import HubState
from shardwise.comm import Group, JsonValue
from shardwise.convert import HeldGroup
from shardwise.engine.load import LoadOptions
from shardwise.engine.near_names import listed
from shardwise.errors import UnexpectedTensorError
from shardwise.format.dtypes import torch_dtype
from shardwise.io.sources import Source
from shardwise.plan.deferred import Deferred, held_whole, stands_alone
from shardwise.plan.fragments import HeldTensor
from shardwise.stateful_wrappers.install import Installing, post_steps
from shardwise.stateful_wrappers.names import Listing, plain_name, unwrap
from shardwise.stateful_wrappers.units import Step, Taker
from shardwise.stateful_wrappers.ways import EXTRA
from shardwise.types import TensorSpec

_LOG = logging.getLogger(__name__)


def as_owners_take(
    held: Sequence[HeldTensor], hub: HubState, computed: Sequence[HeldGroup], source: Source
) -> list[HeldTensor]:
    """What is to be loaded, with what modules with methods of their own decide about themselves. Local.

    Of what such a module takes, shapes are those of the files; what the files lack is for it to miss; and what they
    have below its name, and nobody else wants, is for it to take.

    Args:
        held: What this rank holds, under the names of the files.
        hub: The same, and how it was listed.
        computed: What is converted apart.
        source: What there is.
    """
    found = list(in_shapes_of(held, {name: saved.spec for name, saved in source.tensors.items()}))
    own = {tensor.spec.name for tensor in held} | {spec.name for each in computed for spec in each.computed.hub}
    listing = hub.listing
    takers = [] if listing is None else [taker for steps in listing.steps for taker in _lenient(steps)]
    takers.sort(key=lambda taker: len(taker.prefix), reverse=True)
    for name, saved in source.tensors.items() if takers else ():
        if name in own or name in hub.ties:
            continue
        taker = next((taker for taker in takers if _is_below(name, taker)), None)
        if taker is not None:
            key = taker.prefix + name[len(plain_name(taker.prefix)) :]
            shape, dtype = saved.spec.shape, torch_dtype(saved.spec.dtype)
            what = Deferred(key, shape, dtype, torch.device("cpu"), None, taker, is_flexible=True)
            found.append(held_whole(saved.spec, what))
    return found


def in_shapes_of(held: Iterable[HeldTensor], specs: Mapping[str, TensorSpec]) -> Iterator[HeldTensor]:
    """What is to be loaded; what modules take in any shape in that of the files, as far as these have it. Local."""
    for tensor in held:
        what = stands_alone(tensor)
        saved = specs.get(tensor.spec.name)
        if what is None:
            yield tensor
        elif saved is not None:
            spec = tensor.spec._replace(shape=saved.shape)
            yield tensor if spec == tensor.spec else held_whole(spec, what.of_shape(spec.shape))


def _lenient(steps: Sequence[Step]) -> Iterator[Taker]:
    return (step.taker for step in steps if step.taker is not None and step.taker.is_lenient)


def _is_below(name: str, taker: Taker) -> bool:
    prefix = plain_name(taker.prefix)
    if not name.startswith(prefix):
        return False
    first, _, rest = name[len(prefix) :].partition(".")
    return taker.whole or not rest or first not in taker.module._modules


def steps_of(parts: Sequence[nn.Module], listing: Listing | None) -> list[Step]:
    """What a rank's parts have to do beside having their memory filled. Local.

    Args:
        parts: The parts.
        listing: How they were listed; ``None`` where all take their state as torch does.
    """
    found: list[Step] = []
    for number, part in enumerate(parts):
        own = () if listing is None else listing.steps[number]
        found += own or post_steps(unwrap(part))
    return found


@dataclass(frozen=True, slots=True)
class Taking:
    """How a rank's modules take what is not read into their memory.

    Attributes:
        steps: What this rank has to do, in order.
        aside: What was saved beside tensors; ``None`` where nothing was.
        options: What may differ.
        rounds: How many modules of some rank take tensors, and one more; 0 where no rank has anything to do.
    """

    steps: Sequence[Step]
    aside: SavedAside | None
    options: LoadOptions
    rounds: int

    def run(self, values: Callable[[object], dict[str, torch.Tensor]], what: str, group: Group) -> None:
        """Let the modules take their state, one by one. All ranks call.

        Args:
            values: Reads what there is for one of them.
            what: Where it comes from, for messages.
            group: The ranks that load together.

        Raises:
            ModuleStateError: A module refuses what it is given; which modules came before it is torch's order.
        """
        without: list[str] = []
        rounds = list(_rounds(self.steps))
        for number in range(self.rounds):
            tensors: dict[str, torch.Tensor] = {}
            steps = rounds[number] if number < len(rounds) else []
            # Apart: a module's own method may communicate, so that no rank may have failed before it.
            with group.together(f"reading {what}"):
                if steps and steps[0].taker is not None:
                    tensors = values(steps[0].taker)
            with group.together("installing the state of modules"):
                without += self._install(steps, tensors)
        if without:
            _LOG.warning("no state was saved for %s, which keep what they have", listed(without))

    def _install(self, steps: Sequence[Step], values: dict[str, torch.Tensor]) -> list[str]:
        aside = self.aside
        installing = Installing(
            lambda _: values,
            None if aside is None else aside.values,
            {} if aside is None else aside.metadata,
            self.options.allow_missing,
        )
        installing.run(steps)
        return installing.without


def _rounds(steps: Sequence[Step]) -> Iterator[list[Step]]:
    """Steps in groups, of which only the first of each may take tensors."""
    group: list[Step] = []
    for step in steps:
        if step.taker is not None and group:
            yield group
            group = []
        group.append(step)
    if group:
        yield group


def open_taking(steps: Sequence[Step], stems: Sequence[str], group: Group, options: LoadOptions) -> Taking:
    """Agree on what modules have to take, and read what was saved beside tensors. All ranks call; nothing is written.

    Args:
        steps: What this rank's modules have to do.
        stems: Where there is state beside tensors.
        group: The ranks that load together.
        options: What may differ.

    Raises:
        UnexpectedTensorError: State was saved that no rank's model takes.
        StateFormatError: It is damaged.
    """
    found: SavedAside | None = None

    def tell() -> JsonValue:
        nonlocal found
        found = read_aside(stems)
        names = [] if found is None else sorted(found.values)
        return [sum(1 for _ in _rounds(steps)), [int(any(_takes(step, name) for step in steps)) for name in names]]

    everyone = cast("list[tuple[int, list[int]]]", group.gather(tell, "comparing what modules take"))
    counts = [sum(column) for column in zip(*(theirs for _, theirs in everyone), strict=True)]
    names = [] if found is None else sorted(found.values)
    lost = [name for name, count in zip(names, counts, strict=True) if not count]
    if lost and not options.allow_unexpected:
        raise UnexpectedTensorError(
            f"the checkpoint holds state beside tensors that no module of the model takes: {listed(lost)}",
            tensor=lost[0],
            hint="Build the model as it was when the checkpoint was saved.",
        )
    return Taking(steps, found, options, max(rounds for rounds, _ in everyone))


def _takes(step: Step, name: str) -> bool:
    prefix = plain_name(step.prefix)
    if step.kind == "extra":
        return name == plain_name(step.prefix + EXTRA)
    return step.taker is not None and step.taker.is_lenient and name.startswith(prefix)
