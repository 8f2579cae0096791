"""Checks an export: the planned headers against the base model and the model class, the written ones against the plan.

The first comparison needs headers only, so it is made before a byte is written. After writing, the headers of the files
are read back.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from shardwise.base.files import BaseModel
from shardwise.checkpointing.exported_part import exported_modules
from shardwise.comm import Group
from shardwise.disk.guarded import open_regular, read_exactly
from shardwise.disk.names import is_file, names_in
from shardwise.engine.export import ExportPlan
from shardwise.errors import ExportMismatchError, FormatError
from shardwise.format.header import Header, read_header
from shardwise.format.index import read_index
from shardwise.format.json_file import read_json
from shardwise.geometry import TensorSpec
from shardwise.plan.layout import FileLayout, index_name
from shardwise.stateful_wrappers.model_parts import config_of
from shardwise.stateful_wrappers.wrapping import original_class, unwrap
from shardwise.upstream.torch_modules import unsaved_buffers
from shardwise.upstream.transformers import may_be_unexpected

_SHOWN = 10
#: Tensors that a quantized base has beside or instead of a weight; an ordinary floating point weight has none.
_QUANTIZED = re.compile(r"(_scale_inv|_scale|_scales|_blocks|_zero_point|weight_packed|weight_shape|input_scale)$")
_LEGACY = ((re.compile(r"\.gamma$"), ".weight"), (re.compile(r"\.beta$"), ".bias"))


@dataclass(frozen=True)
class Expectation:
    """What the model class says about the tensors in its files.

    Attributes:
        aliases: Names that files of this model may have and ours do not, such as aliases of tied tensors.
        unloaded: Patterns of tensors that the model class is known not to load (transformers'
            ``_keys_to_ignore_on_load_unexpected``).
        computed: The last two components of the names of buffers that the model computes and does not save.
        prefix: transformers' ``base_model_prefix``.
        architectures: Class names that ``config.json`` will name.
        vocab_size: Of the model's configuration, where it has one.
        keys: Names of the base model's tensors in the settings of all ranks.
    """

    aliases: frozenset[str] = frozenset()
    unloaded: tuple[str, ...] = ()
    computed: frozenset[str] = frozenset()
    prefix: str = ""
    architectures: tuple[str, ...] = ()
    vocab_size: int | None = None
    keys: tuple[str, ...] = ()


@dataclass(frozen=True)
class HeaderComparison:
    """Result of comparing an export's headers.

    Attributes:
        passed: Tensors of the base that the model class does not load and the export carries over.
        differences: One sentence for each difference; empty for a correct export.
    """

    passed: tuple[str, ...] = ()
    differences: tuple[str, ...] = ()


#: One rank's part of an `Expectation`: see `expectation_row`.
ExpectationRow = tuple[list[str], list[str], list[str], str, str, int | None]


def expectation_row(parts: Sequence[nn.Module], absent: Iterable[str]) -> ExpectationRow | None:
    """This rank's row for `merge_expectations`; ``None`` where the rank has no part of the model. Local."""
    if not parts:
        return None
    module = exported_modules(parts)[0]
    config = config_of(module)
    text = getattr(config, "text_config", None) or config
    size = getattr(text, "vocab_size", None)
    computed = {_tail(name) for part in parts for name in _computed_buffers(unwrap(part))}
    return (
        list(absent),
        sorted(may_be_unexpected(module)),
        sorted(computed),
        str(getattr(module, "base_model_prefix", "") or ""),
        original_class(module).__name__,
        size if isinstance(size, int) else None,
    )


def merge_expectations(rows: Sequence[ExpectationRow], keys: Iterable[str]) -> Expectation:
    """Merge the rows of all ranks: pipeline stages have different parts of the model."""
    prefixes = [prefix for _, _, _, prefix, _, _ in rows if prefix]
    sizes = [size for *_, size in rows if size is not None]
    return Expectation(
        frozenset(name for names, *_ in rows for name in names),
        tuple(dict.fromkeys(pattern for _, patterns, *_ in rows for pattern in patterns)),
        frozenset(name for _, _, names, *_ in rows for name in names),
        prefixes[0] if prefixes else "",
        tuple(architecture for *_, architecture, _ in rows[:1]),
        sizes[0] if sizes else None,
        tuple(dict.fromkeys(keys)),
    )


def _computed_buffers(module: nn.Module) -> Iterable[str]:
    for path, each in module.named_modules():
        for leaf in unsaved_buffers(each):
            yield f"{path}.{leaf}"


def _tail(name: str) -> str:
    """``rotary_emb.inv_freq`` of ``model.layers.0.self_attn.rotary_emb.inv_freq``: releases move such buffers about."""
    return ".".join(name.split(".")[-2:])


def compare_with_base(
    specs: Sequence[TensorSpec], base: BaseModel, expectation: Expectation, *, pass_through: bool
) -> HeaderComparison:
    """Compare what will be written with the base model's headers. Pure but for reading the base's config.json.

    ``specs`` are the tensors of all ranks, under the names of the files. With ``pass_through``, tensors that the class
    does not load are carried over.
    """
    written = {spec.name: spec for spec in specs}
    config = _base_config(base.directory)
    same = _same_architecture(config, expectation)
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
    return HeaderComparison(tuple(passed) if same and pass_through else (), tuple(differences))


def compare_with_keys(specs: Sequence[TensorSpec], expectation: Expectation) -> HeaderComparison:
    """Compare what will be written with the names in the settings. Pure."""
    written = {spec.name: spec for spec in specs}
    lost = [key for key in expectation.keys if key not in written and not _accounted(key, written, expectation, {})]
    return HeaderComparison((), tuple(f"{key}: in model_state_dict_keys, and the export lacks it" for key in lost))


def _differs(spec: TensorSpec, known: TensorSpec, config: Mapping[str, object], expectation: Expectation) -> str | None:
    quantized = bool(config.get("quantization_config"))
    if spec.shape != known.shape and not (quantized or _resized(spec, known, expectation)):
        return f"{spec.name}: shape {list(spec.shape)}, in the base model {list(known.shape)}"
    if spec.dtype != known.dtype and not quantized:
        return f"{spec.name}: dtype {spec.dtype}, in the base model {known.dtype}"
    return None


def _resized(spec: TensorSpec, known: TensorSpec, expectation: Expectation) -> bool:
    """Whether the only difference is a vocabulary that was resized, as the model's configuration says too."""
    if len(spec.shape) != len(known.shape) or spec.shape[1:] != known.shape[1:] or expectation.vocab_size is None:
        return False
    return spec.shape[0] == expectation.vocab_size


def _accounted(
    name: str, written: Mapping[str, TensorSpec], expectation: Expectation, config: Mapping[str, object]
) -> bool:
    """Whether a tensor of the base is in the export under another name, or may be absent."""
    if name in expectation.aliases or _tail(name) in expectation.computed:
        return True
    if config.get("quantization_config") and _QUANTIZED.search(name):
        return True
    plain = name
    for pattern, replacement in _LEGACY:
        plain = pattern.sub(replacement, plain)
    prefix = f"{expectation.prefix}." if expectation.prefix else ""
    candidates = (plain, prefix + plain, plain.removeprefix(prefix))
    return any(candidate in written or candidate in expectation.aliases for candidate in candidates)


def _base_config(directory: Path) -> Mapping[str, object]:
    path = directory / "config.json"
    if not is_file(path):
        return {}
    try:
        found = read_json(path)
    except FormatError:
        # The base's config is not ours to judge: an unreadable one adds no expectation.
        return {}
    return found if isinstance(found, dict) else {}


def _same_architecture(config: Mapping[str, object], expectation: Expectation) -> bool:
    named = config.get("architectures")
    return isinstance(named, list) and set(map(str, named)) == set(expectation.architectures)


def require_equal(comparison: HeaderComparison, path: Path) -> None:
    """Raise `ExportMismatchError`, which lists the differences, if there are any."""
    if not comparison.differences:
        return
    more = len(comparison.differences) - _SHOWN
    listed = "; ".join(comparison.differences[:_SHOWN]) + (f"; and {more} more" if more > 0 else "")
    raise ExportMismatchError(
        f"the export would differ from what the base model promises: {listed}",
        path=path,
        tensor=comparison.differences[0].partition(":")[0],
        hint="Nothing is published. Set verify_export to false if this is what you want.",
    )


def read_back(plan: ExportPlan, group: Group) -> None:
    """Compare the written files' headers and index with the plan. Local: each rank of the group reads some files.

    Raises:
        ExportMismatchError: A file or tensor is absent, surplus, or of another shape, dtype or place.
        FormatError: A header or the index is damaged.
    """
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
    require_equal(HeaderComparison((), tuple(differences)), directory)


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
