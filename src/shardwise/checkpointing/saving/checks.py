"""Checks an export: before a byte is written against the base model and against the class that is to open it.

The headers are compared with the base's from facts that the ranks gather: each pipeline stage knows only its own part
of the model. After writing, the headers of the files are read back and compared with the plan.

The class named in config.json is built from that very file on the meta device, and its library's own code for loading
is run on tensors without memory: renamings, conversions, the base model's prefix, ties and what the class knows to be
missing are its own. Names and shapes are all that is looked at.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import nn

from shardwise.addons.hf_config import CONFIG, untied
from shardwise.base.class_of_config import build_on_meta, configuration, named_classes, quiet
from shardwise.base.files import BaseModel, base_config
from shardwise.checkpointing.hub import exported_modules, recomputed_buffers
from shardwise.comm import Group, JsonValue
from shardwise.disk.guarded import open_regular, read_exactly
from shardwise.disk.names import is_file, names_in
from shardwise.dtypes import torch_dtype
from shardwise.engine.export import ExportPlan
from shardwise.engine.memo import Memo
from shardwise.engine.name_suggestions import listed
from shardwise.errors import ExportMismatchError, FormatError
from shardwise.format.header import Header, read_header
from shardwise.format.index import read_index
from shardwise.format.json_file import read_json_object
from shardwise.geometry import TensorSpec
from shardwise.plan.layout import FileLayout, index_name
from shardwise.plan.roster import Roster
from shardwise.stateful_wrappers.model_parts import config_of, described_part
from shardwise.stateful_wrappers.wrapping import is_pretrained, original_class, unwrap
from shardwise.upstream.hugging_face import CLASS_NAME, model_mixin
from shardwise.upstream.transformers import (
    config_class,
    left_out,
    load_on_meta,
    may_be_unexpected,
    registered_classes,
)

_SHOWN = 10
#: Tensors that a quantized base has beside or instead of a weight; an ordinary floating point weight has none.
_QUANTIZED = re.compile(r"(_scale_inv|_scale|_scales|_blocks|_zero_point|weight_packed|weight_shape|input_scale)$")
_LEGACY = ((re.compile(r"\.gamma$"), ".weight"), (re.compile(r"\.beta$"), ".bias"))


class Expectation(NamedTuple):
    """What the model class says about the tensors in its files: by one rank's part of the model, or by all parts.

    Attributes:
        aliases: Names that files of this model may have and ours do not, such as aliases of tied tensors.
        unloaded: Patterns of tensors that the model class is known not to load (transformers'
            ``_keys_to_ignore_on_load_unexpected``).
        computed: The last two components of the names of buffers that the model computes and does not save.
        prefix: transformers' ``base_model_prefix``.
        architectures: Class names that ``config.json`` will name.
        vocab_size: Of the model's configuration, where it has one.
        keys: Names of the base model's tensors in the settings (``model_state_dict_keys``).
    """

    aliases: Collection[str] = ()
    unloaded: Collection[str] = ()
    computed: Collection[str] = ()
    prefix: str = ""
    architectures: Sequence[str] = ()
    vocab_size: int | None = None
    keys: Collection[str] = ()


def expectation_of(parts: Sequence[nn.Module], absent: Iterable[str], keys: Collection[str] | None) -> Expectation:
    """What this rank's part of the model and ``keys`` in its settings say, as JSON has it. Local."""
    own = Expectation(keys=list(keys or ()))
    if not parts:
        return own
    module = exported_modules(parts)[0]
    config = config_of(module)
    size = getattr(getattr(config, "text_config", None) or config, "vocab_size", None)
    return own._replace(
        aliases=list(absent),
        unloaded=sorted(may_be_unexpected(module)),
        computed=sorted({name for part in parts for name in recomputed_buffers(unwrap(part))}),
        prefix=str(getattr(module, "base_model_prefix", "") or ""),
        architectures=[original_class(module).__name__],
        vocab_size=size if isinstance(size, int) else None,
    )


def compare_with_base(
    specs: Sequence[TensorSpec], base: BaseModel, expectation: Expectation, *, pass_through: bool
) -> tuple[list[str], list[str]]:
    """Compare what will be written with the base model's headers. Pure but for reading the base's config.json.

    Returns the tensors of the base that the model class does not load and the export carries over (with
    ``pass_through``), and one sentence for each difference; none for a correct export.
    """
    written = {spec.name: spec for spec in specs}
    try:
        config: Mapping[str, object] = base_config(base.directory)
    except FormatError:
        config = {}  # the base's config is not ours to judge: an unreadable one adds no expectation
    named = config.get("architectures")
    same = isinstance(named, list) and set(map(str, named)) == set(expectation.architectures)
    differences = [
        difference
        for name, spec in written.items()
        if name in base.specs and (difference := _differs(spec, base.specs[name], config, expectation))
    ]
    absent = [name for name in base.specs if name not in written and not _accounted(name, written, expectation, config)]
    passed = [name for name in absent if any(re.search(p, name) for p in expectation.unloaded)]
    if same:
        lost = [name for name in absent if name not in passed]
        differences += [f"{name}: the base model ships it, the export lacks it" for name in lost]
    return passed if same and pass_through else [], differences


def compare_with_keys(specs: Sequence[TensorSpec], expectation: Expectation) -> list[str]:
    """Compare what will be written with the names in the settings; a sentence for each difference. Pure."""
    written = {spec.name: spec for spec in specs}
    lost = [key for key in expectation.keys if key not in written and not _accounted(key, written, expectation, {})]
    return [f"{key}: in model_state_dict_keys, and the export lacks it" for key in lost]


def _differs(spec: TensorSpec, known: TensorSpec, config: Mapping[str, object], expectation: Expectation) -> str | None:
    if config.get("quantization_config"):
        return None
    # A vocabulary may have been resized, as the model's configuration says too.
    resized = (expectation.vocab_size, *known.shape[1:]) if known.shape else ()
    if spec.shape not in (known.shape, resized):
        return f"{spec.name}: shape {list(spec.shape)}, in the base model {list(known.shape)}"
    if spec.dtype != known.dtype:
        return f"{spec.name}: dtype {spec.dtype}, in the base model {known.dtype}"
    return None


def _accounted(
    name: str, written: Mapping[str, TensorSpec], expectation: Expectation, config: Mapping[str, object]
) -> bool:
    """Whether a tensor of the base is in the export under another name, or may be absent."""
    # ``rotary_emb.inv_freq`` of ``model.layers.0.self_attn.rotary_emb.inv_freq``: releases move such buffers about.
    if name in expectation.aliases or ".".join(name.split(".")[-2:]) in expectation.computed:
        return True
    if config.get("quantization_config") and _QUANTIZED.search(name):
        return True
    plain = name
    for pattern, replacement in _LEGACY:
        plain = pattern.sub(replacement, plain)
    prefix = f"{expectation.prefix}." if expectation.prefix else ""
    candidates = (plain, prefix + plain, plain.removeprefix(prefix))
    return any(candidate in written or candidate in expectation.aliases for candidate in candidates)


def require_equal(differences: Sequence[str], path: Path) -> None:
    """Raise `ExportMismatchError`, which lists the differences, if there are any."""
    if not differences:
        return
    more = len(differences) - _SHOWN
    listed = "; ".join(differences[:_SHOWN]) + (f"; and {more} more" if more > 0 else "")
    raise ExportMismatchError(
        f"the export would differ from what the base model promises: {listed}",
        path=path,
        tensor=differences[0].partition(":")[0],
        hint="Nothing is published. Set verify_export to false if this is what you want.",
    )


def read_back(plan: ExportPlan, group: Group) -> None:
    """Compare the written files' headers and index with the plan. Local: each rank of the group reads some files."""
    directory, layout = plan.directory, plan.layout
    differences: list[str] = []
    for number, file in enumerate(layout.files):
        path = directory / file.name
        if number % group.world_size == group.rank and not _as_planned(path, file.header, file.size):
            differences += _unlike(file, read_header(path))
    if group.is_main:
        planned = {file.name for file in layout.files}
        found = {name for name in names_in(directory) if name.endswith(".safetensors")}
        differences += [f"{name}: not written" for name in sorted(planned - found)]
        differences += [f"{name}: not planned" for name in sorted(found - planned)]
        index = directory / index_name(plan.options.stem)
        if plan.options.index and not _as_planned(index, layout.index, len(layout.index)):
            same = read_index(index).weight_map == layout.weight_map
            differences.append(f"{index.name}: {'has other bytes' if same else 'lists other tensors or files'}")
    require_equal(differences, directory)


def _as_planned(path: Path, head: bytes, size: int) -> bool:
    """Whether a file has this size and begins with these bytes; if not, parsing it shows the difference."""
    try:
        with open_regular(path, FormatError) as (written, found):
            return found == size and read_exactly(written, len(head)) == head
    except (OSError, FormatError):
        return False


def _unlike(file: FileLayout, header: Header) -> list[str]:
    found = {entry.spec.name: entry for entry in header.entries}
    differences = []
    for entry in file.entries:
        have = found.pop(entry.spec.name, None)
        if have is None:
            differences.append(f"{entry.spec.name}: not in {file.name}")
        elif have != entry:
            differences.append(f"{entry.spec.name}: {have} in {file.name}, {entry} planned")
    differences += [f"{name}: in {file.name}, but not planned" for name in found]
    return differences or [f"{file.name}: its header has other bytes than planned"]


class Facts(NamedTuple):
    """What the ranks gather about a model: of one rank, or merged of all.

    Attributes:
        quantized: Whether there are quantized parameters.
        beside: For each rank the names of the state beside ordinary tensors, see `module_state_names`.
        expectation: What the model says about its files, where there is a base model to compare with.
        native: Name of a tensor exported in another dtype -> its dtype in memory.
        outside: Names of tensors outside the exported model.
        excluded: Names of tensors that the class excludes from its files.
        specs: Names, shapes and dtypes that an export would have, where the written files do not show them.
    """

    quantized: bool
    beside: list[list[list[str]]]
    expectation: Expectation = Expectation()
    native: Mapping[str, str] = {}
    outside: Collection[str] = ()
    excluded: Collection[str] = ()
    specs: Sequence[TensorSpec] = ()

    @staticmethod
    def merged(notes: Sequence[JsonValue]) -> Facts:
        """Merge the gathered facts of all ranks."""
        rows = [Facts(*cast("tuple[Any, ...]", note)) for note in notes]
        specs = {name: TensorSpec(name, tuple(shape), dtype) for row in rows for name, shape, dtype in row.specs}
        said = [Expectation(*row.expectation) for row in rows]
        expectation = Expectation(
            frozenset(name for each in said for name in each.aliases),
            tuple(dict.fromkeys(pattern for each in said for pattern in each.unloaded)),
            frozenset(name for each in said for name in each.computed),
            next((each.prefix for each in said if each.prefix), ""),
            next((each.architectures for each in said if each.architectures), ()),
            next((each.vocab_size for each in said if each.vocab_size is not None), None),
            tuple(dict.fromkeys(key for each in said for key in each.keys)),
        )
        return Facts(
            any(row.quantized for row in rows),
            [names for row in rows for names in row.beside],
            expectation,
            {name: dtype for row in rows for name, dtype in row.native.items()},
            frozenset(name for row in rows for name in row.outside),
            sorted({name for row in rows for name in row.excluded}),
            tuple(specs.values()),
        )


#: Differences between a class and the files of an export: kind -> names; no names for a correct export.
Misfit = dict[str, list[str]]


def _misfit(missing: Iterable[object], unexpected: Iterable[object], shapes: Iterable[object]) -> Misfit:
    kinds = {"missing": missing, "unexpected": unexpected, "of another shape": shapes}
    return {kind: sorted(map(str, names)) for kind, names in kinds.items()}


def _size(found: tuple[str, Misfit]) -> int:
    return sum(map(len, found[1].values()))


class _CannotCheckError(Exception):
    """Why the check is not possible."""


class ClassCheck:
    """Checks exports, each kind once. Used on rank 0."""

    def __init__(self) -> None:
        self._sound: dict[bool, Memo[None]] = {False: Memo(), True: Memo()}  # by whether config.json ties nothing

    def check(
        self,
        parts: Sequence[nn.Module],
        directory: Path,
        roster: Roster,
        log: Callable[[int, str], None],
        *,
        passed: Sequence[TensorSpec] = (),
        left_out: Collection[str] = (),
        untie: bool = False,
    ) -> None:
        """Check an export, unless the same was checked before. Rank 0 calls when config.json is written and no tensor.

        ``roster`` has all ranks' tensors under the names that the files are to have, of which ``left_out`` are not
        exported, and ``passed`` further ones, carried over from a base. ``log`` is told why one cannot be checked. With
        ``untie``, config.json is read as one that ties nothing.
        """
        model = described_part(parts)
        if model is None or not is_file(directory / CONFIG):
            return
        entries = read_json_object(directory / CONFIG)
        if untie:
            entries = untied(entries)
        if self._sound[untie].holds([roster, type(model)], (entries, passed)):
            return
        specs = [spec for spec in roster.specs if spec.name not in left_out]
        try:
            name, misfit = _look(model, entries, [*specs, *passed])
        except _CannotCheckError as why:
            log(logging.INFO, f"the export's names are not checked against a class: {why}")
        else:
            _require_fit(name, misfit, directory / CONFIG)
        self._sound[untie].get([roster, type(model)], (entries, passed), lambda: None)


def check_described(entries: Mapping[str, object], specs: Sequence[TensorSpec], path: Path) -> str | None:
    """Check tensors against the class of transformers' that a configuration names, without a model at hand. Local.

    ``entries`` is the content of config.json at ``path``. Returns why nothing could be checked, ``None`` where the
    class would load them; raises `ExportMismatchError` where it would not.
    """
    classes = [] if CLASS_NAME in entries else named_classes(entries)
    if entries.get("quantization_config") or entries.get("auto_map") or not classes:
        return "config.json names no class of transformers' whose tensors it tells"
    try:
        found = [(cls.__name__, _by_transformers(cls, cast(Any, cls).config_class, entries, specs)) for cls in classes]
    except _CannotCheckError as why:
        return str(why)
    _require_fit(*min(found, key=_size), path)
    return None


def _require_fit(name: str, misfit: Misfit, path: Path) -> None:
    differences = [f"{kind}: {listed(names)}" for kind, names in misfit.items() if names]
    if differences:
        raise ExportMismatchError(
            f"{name}, which is what the export's config.json describes, would not load it: {'; '.join(differences)}",
            path=path,
            hint="Save the model that has these names (the one inside of a wrapper), adapters with is_peft or merged, "
            "and what the class does not know in a module around it; let the config say what the model is. Nothing is "
            "published. Set verify_export to false (consolidate --no-class-check) if this is what you want.",
        )


def _look(model: nn.Module, entries: Mapping[str, object], specs: Sequence[TensorSpec]) -> tuple[str, Misfit]:
    """The name of the class that is described, and what of the tensors does not fit it."""
    if isinstance(model, model_mixin() or ()):
        cls = original_class(model)
        return cls.__name__, _by_diffusers(cls, entries, specs)
    config = config_of(model)
    known = config_class()
    if known is None or not isinstance(config, known):
        raise _CannotCheckError(
            f"the config of {original_class(model).__name__} is not of a library that builds models"
        )
    if entries.get("quantization_config"):
        raise _CannotCheckError("it is quantized")
    if is_pretrained(model):
        cls = original_class(model)
        return cls.__name__, _by_transformers(cls, type(config), entries, specs)
    named = named_classes(entries)
    classes: Sequence[type] = named or registered_classes(type(config))
    if not classes:
        raise _CannotCheckError(f"transformers has no class for {type(config).__name__}")
    # A model that is no class of transformers' and shows a configuration of its: some class has to open it.
    found = [
        (cls.__name__, _by_transformers(cls, type(config), entries, specs)) for cls in classes[: len(named) or None]
    ]
    return min(found, key=_size)


def _by_transformers(cls: type, config: type, entries: Mapping[str, object], specs: Sequence[TensorSpec]) -> Misfit:
    """Let transformers load tensors without memory into a model without memory."""
    tensors = {s.name: torch.empty(s.shape, dtype=torch_dtype(s.dtype), device="meta") for s in specs}
    try:
        built = build_on_meta(cls, configuration(config, entries))
        with quiet():
            found = load_on_meta(built, tensors)
    except Exception as error:
        raise _CannotCheckError(f"{cls.__name__} on the meta device: {type(error).__name__}: {error}") from error
    shapes = [f"{name} ({list(ours)}, in the class {list(theirs)})" for name, ours, theirs in found.mismatched]
    # What the class itself leaves out of the files that it writes is not missing from ours.
    missing = found.missing - left_out(built)
    return _misfit(missing, found.unexpected, [*shapes, *found.failed])


def _by_diffusers(cls: type, entries: Mapping[str, object], specs: Sequence[TensorSpec]) -> Misfit:
    try:
        theirs = {name: tuple(value.shape) for name, value in build_on_meta(cls, entries).state_dict().items()}
    except Exception as error:
        raise _CannotCheckError(f"{cls.__name__} on the meta device: {type(error).__name__}: {error}") from error
    ours = {spec.name: spec.shape for spec in specs}
    shapes = [
        f"{name} ({list(ours[name])}, in the class {list(theirs[name])})"
        for name in ours.keys() & theirs.keys()
        if ours[name] != theirs[name]
    ]
    return _misfit(theirs.keys() - ours.keys(), ours.keys() - theirs.keys(), shapes)
