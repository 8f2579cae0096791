"""State of modules beside ordinary tensors, and the modules' own loading code, which is called in torch's order.

Extra state, quantized weights and torch's versions are saved in a separate directory beside the model's tensors, in
files of JSON and tensors, and are not part of an export. Each value is written by the lowest rank that holds it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from shardwise.checkpointing.hub import HubState
from shardwise.comm import Group
from shardwise.convert.rules import HeldGroup
from shardwise.disk.names import files_under, is_file
from shardwise.disk.storage import Storage
from shardwise.dtypes import torch_dtype
from shardwise.engine.load import LoadOptions
from shardwise.engine.name_suggestions import listed
from shardwise.engine.records import ComponentRecord, local_step, write_state
from shardwise.engine.records import Step as SaveStep
from shardwise.errors import MissingTensorError, ModuleStateError, StateFormatError, UnexpectedTensorError
from shardwise.format.notes import ASIDE_DIR
from shardwise.geometry import TensorSpec
from shardwise.plan.deferred import Deferred, held_whole, stands_alone
from shardwise.plan.fragments import HeldTensor
from shardwise.sources.sources import Source
from shardwise.sources.state_files import pack_state, read_state
from shardwise.stateful_wrappers.model import Installing, post_steps
from shardwise.stateful_wrappers.names import Listing
from shardwise.stateful_wrappers.units import Aside, Step, Taker, label
from shardwise.stateful_wrappers.wrapping import plain_name, unwrap
from shardwise.upstream.torch_dispatch import map_leaves
from shardwise.upstream.torch_modules import EXTRA, own_children

_LOG = logging.getLogger(__name__)
_VERSION = 1


#: The state saved beside a model's tensors, and what torch noted of each module (its version), by plain name.
SavedModuleState = tuple[dict[str, object], dict[str, Mapping[str, object]]]


def module_state_names(listing: Listing | None) -> list[list[str]]:
    """Names of a model's values beside its tensors, and names of its modules with torch metadata."""
    return [[], []] if listing is None else [sorted(listing.aside), sorted(listing.metadata)]


def module_state_step(
    listing: Listing | None, everyone: Sequence[list[list[str]]], directory: Path, group: Group, storage: Storage
) -> SaveStep:
    """Capture this rank's part of the module state now, and return the step that writes it. All ranks call.

    ``everyone`` has the `module_state_names` of each rank, ``directory`` is the model's. A value that cannot be stored
    is a `ModuleStateError` that names the module.
    """
    values = {} if listing is None else listing.aside
    metadata = {} if listing is None else listing.metadata
    stem = directory / ASIDE_DIR / f"state-{group.rank + 1:05d}"

    def take() -> dict[str, bytes]:
        below = {name for names, _ in everyone[: group.rank] for name in names}
        noted = {name for _, names in everyone[: group.rank] for name in names}
        own = {name: value for name, value in values.items() if name not in below}
        own_notes = {name: dict(found) for name, found in metadata.items() if name not in noted}
        return _packed(own, own_notes) if own or own_notes else {}

    packed = group.attempt(take, "taking what modules have beside tensors")

    def write() -> ComponentRecord:
        if not packed:
            return ComponentRecord()
        storage.make_directory(stem.parent)
        record = write_state(storage, stem, packed)
        storage.sync_directory(stem.parent)
        storage.sync_directory(directory)
        return record.below(ASIDE_DIR)

    return local_step(f"writing {stem.parent}", write)


def _packed(values: Mapping[str, Aside], metadata: Mapping[str, Mapping[str, object]]) -> dict[str, bytes]:
    plain = {name: _plain(value) for name, (value, _) in values.items()}
    try:
        return pack_state({"version": _VERSION, "values": plain, "metadata": metadata})
    except StateFormatError as failure:
        for name, (value, label) in values.items():  # which of them it is
            try:
                pack_state(_plain(value))
            except StateFormatError as error:
                raise ModuleStateError(
                    f"{label} gives for its state what cannot be stored without pickle: {error.message}",
                    tensor=name,
                    hint="Let get_extra_state return a tensor, or numbers, text, bytes, lists, tuples and dicts of "
                    "such.",
                ) from error
        raise ModuleStateError(
            f"what torch notes of the modules' versions cannot be stored: {failure.message}", hint=failure.hint
        ) from failure


def _plain(value: object) -> object:
    """A value with its parameters replaced by plain tensors."""

    def change(leaf: object) -> object:
        if isinstance(leaf, nn.Parameter) and not isinstance(leaf, DTensor):
            return leaf.detach().as_subclass(torch.Tensor)
        return leaf

    return map_leaves(change, value)


def find_module_state(path: Path) -> list[str]:
    """The stems of the files of module state beside the model at ``path``; none in other tools' checkpoints. Local."""
    places = (path, path.parent, path.parent.parent) if is_file(path) else (path, path.parent)
    for place in places:
        found = [path for path in files_under(place / ASIDE_DIR) if path.match("state-*.json")]
        if found:
            return [str(file.with_suffix("")) for file in found]
    return []


def read_module_state(stems: Sequence[str]) -> SavedModuleState | None:
    """Read what `module_state_step` wrote, if anything; `StateFormatError` if a file is damaged. Local."""
    if not stems:
        return None
    values: dict[str, object] = {}
    metadata: dict[str, Mapping[str, object]] = {}
    for stem in stems:
        state = read_state(Path(stem))
        fields = state if isinstance(state, dict) else {}
        own, noted = fields.get("values"), fields.get("metadata")
        if fields.get("version") != _VERSION or not isinstance(own, dict) or not isinstance(noted, dict):
            raise StateFormatError(
                f"this is not the state of modules; this release reads version {_VERSION}",
                path=f"{stem}.json",
                hint="Restore the file, or choose another checkpoint.",
            )
        values |= own
        metadata |= {str(name): dict(found) for name, found in noted.items() if isinstance(found, dict)}
    return values, metadata


def as_modules_load(
    held: Sequence[HeldTensor], hub: HubState, computed: Sequence[HeldGroup], source: Source
) -> list[HeldTensor]:
    """Adjust the tensors to load for modules that load their state by their own code. Local.

    Such a module gets tensors in the shapes of the files, decides itself whether one is missing, and also gets every
    tensor in the files below its name that no other module loads.
    """
    found = list(in_shapes_of(held, {name: saved.spec for name, saved in source.tensors.items()}))
    own = {tensor.spec.name for tensor in held} | {spec.name for each in computed for spec in each.computed.hub}
    steps = () if hub.listing is None else [step for own_steps in hub.listing.steps for step in own_steps]
    return [*found, *claimed(steps, own | hub.ties.keys(), (saved.spec for saved in source.tensors.values()))]


def claimed(steps: Iterable[Step], own: Collection[str], specs: Iterable[TensorSpec]) -> Iterator[HeldTensor]:
    """Tensors in the files below the names of modules with their own loading code that no other module loads. Local."""
    takers = [step.taker for step in steps if step.taker is not None and step.taker.is_lenient]
    takers.sort(key=lambda taker: len(taker.prefix), reverse=True)
    for spec in specs if takers else ():
        if spec.name in own:
            continue
        taker = next((taker for taker in takers if _is_below(spec.name, taker)), None)
        if taker is not None:
            key = taker.prefix + spec.name[len(plain_name(taker.prefix)) :]
            dtype, cpu = torch_dtype(spec.dtype), torch.device("cpu")
            yield held_whole(spec, Deferred(key, spec.shape, dtype, cpu, None, taker, is_flexible=True))


def with_extra_in_files(steps: Sequence[Step], source: Source) -> tuple[list[Step], list[HeldTensor]]:
    """The steps, and the extra state they load that other tools' files have among their tensors. Local."""
    own: list[Step] = []
    held: list[HeldTensor] = []
    for step in steps:
        saved = source.tensors.get(plain_name(step.prefix + EXTRA)) if step.kind == "extra" else None
        if saved is None:
            own.append(step)
            continue
        taker = Taker(step.module, step.prefix, whole=False, is_lenient=False)
        own.append(Step("take", step.module, step.prefix, taker))
        dtype, cpu = torch_dtype(saved.spec.dtype), torch.device("cpu")
        held.append(held_whole(saved.spec, Deferred(step.prefix + EXTRA, saved.spec.shape, dtype, cpu, None, taker)))
    return own, held


def in_shapes_of(held: Iterable[HeldTensor], specs: Mapping[str, TensorSpec]) -> Iterator[HeldTensor]:
    """The tensors to load; those that modules load in any shape get the shape in the files. Local."""
    for tensor in held:
        what = stands_alone(tensor)
        saved = specs.get(tensor.spec.name)
        if what is None:
            yield tensor
        elif saved is not None:
            spec = tensor.spec._replace(shape=saved.shape)
            yield tensor if spec == tensor.spec else held_whole(spec, replace(what, shape=spec.shape))


def _is_below(name: str, taker: Taker) -> bool:
    prefix = plain_name(taker.prefix)
    if not name.startswith(prefix):
        return False
    first, _, rest = name[len(prefix) :].partition(".")
    return taker.whole or not rest or first not in own_children(taker.module)


def steps_of(parts: Sequence[nn.Module], listing: Listing | None) -> list[Step]:
    """The steps of a rank's parts beyond filling their memory. Local."""
    found: list[Step] = []
    for number, part in enumerate(parts):
        own = () if listing is None else listing.steps[number]
        found += own or post_steps(unwrap(part))
    return found


@dataclass(frozen=True, slots=True)
class ModuleLoad:
    """The steps in which a rank's modules load the saved state by their own code.

    ``rounds`` is one more than the largest number of modules on a rank that load tensors; 0 where no rank has steps. A
    module without saved state, such as a fresh head, may be skipped.
    """

    steps: Sequence[Step]
    module_state: SavedModuleState | None
    options: LoadOptions
    rounds: int
    skips_empty: bool = False

    def run(self, values: Callable[[object], dict[str, torch.Tensor]], what: str, group: Group) -> None:
        """Call the modules' loading code in torch's order; those before a refusal were loaded. All ranks call."""
        without: list[str] = []
        rounds = list(_rounds(self.steps))
        for number in range(self.rounds):
            tensors: dict[str, torch.Tensor] = {}
            steps = rounds[number] if number < len(rounds) else []
            # On its own: a module's own method may communicate, so no rank may have failed before it.
            with group.together(f"reading {what}"):
                if steps and steps[0].taker is not None:
                    tensors = values(steps[0].taker)
            with group.together("installing the state of modules"):
                without += self._install(steps, tensors)
        if without:
            _LOG.warning("no state was saved for %s, and none is set", listed(without))

    def _install(self, steps: Sequence[Step], values: dict[str, torch.Tensor]) -> list[str]:
        saved, metadata = self.module_state or (None, {})
        installing = Installing(lambda _: values, saved, metadata, self.options.allow_missing, self.skips_empty)
        installing.run(steps)
        return installing.without


def _rounds(steps: Sequence[Step]) -> Iterator[list[Step]]:
    """Steps in groups, where only the first step of a group may load tensors."""
    group: list[Step] = []
    for step in steps:
        if step.taker is not None and group:
            yield group
            group = []
        group.append(step)
    if group:
        yield group


def open_module_load(
    steps: Sequence[Step],
    stems: Sequence[str],
    group: Group,
    options: LoadOptions,
    *,
    is_strict: bool,
    skips_empty: bool = False,
) -> ModuleLoad:
    """Agree on the modules' loading steps, and read the saved module state. All ranks call; nothing is written.

    With ``is_strict`` every saved state needs a module; the state beside an export serves other models, too. With
    ``skips_empty`` a module without saved state is skipped.
    """
    found: SavedModuleState | None = None

    def describe() -> tuple[int, list[int]]:
        nonlocal found
        found = read_module_state(stems)
        names = [] if found is None else sorted(found[0])
        if found is not None and is_strict and not options.allow_missing:
            for step in steps:
                name = plain_name(step.prefix + EXTRA)
                if step.kind == "extra" and name not in found[0]:
                    raise MissingTensorError(
                        f"the checkpoint has no extra state for {label(step.module, step.prefix)}",
                        tensor=name,
                        hint="Build the model as it was when the checkpoint was saved, or allow a subset of the keys.",
                    )
        return sum(1 for _ in _rounds(steps)), [int(any(_takes(step, name) for step in steps)) for name in names]

    everyone = group.gather(describe, "comparing the state that modules load")
    counts = [sum(column) for column in zip(*(theirs for _, theirs in everyone), strict=True)]
    names = [] if found is None else sorted(found[0])
    lost = [name for name, count in zip(names, counts, strict=True) if not count]
    if lost and not is_strict:
        if group.is_main:
            _LOG.warning("the model does not take the state that was saved of modules: %s", listed(lost))
    elif lost and not options.allow_unexpected:
        raise UnexpectedTensorError(
            f"the checkpoint holds state beside tensors that no module of the model takes: {listed(lost)}",
            tensor=lost[0],
            hint="Build the model as it was when the checkpoint was saved.",
        )
    return ModuleLoad(steps, found, options, max(rounds for rounds, _ in everyone), skips_empty)


def _takes(step: Step, name: str) -> bool:
    if step.kind == "extra":
        return name == plain_name(step.prefix + EXTRA)
    return step.taker is not None and step.taker.is_lenient and name.startswith(plain_name(step.prefix))
