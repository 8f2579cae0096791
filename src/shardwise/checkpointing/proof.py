"""A save that proves itself: what will be written against what the base model and the model itself promise.

The comparison needs headers only, so it is made before a byte is written; after writing, the headers of the files are
read back and compared with the plan.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from shardwise.checkpointing.base import BaseModel
from shardwise.comm import Group
from shardwise.errors import ExportMismatchError
from shardwise.io.sources import open_source
from shardwise.stateful_wrappers.names import NamedTensor, unwrap
from shardwise.types import TensorSpec

_SHOWN = 10
#: What a quantized base has beside or instead of a weight; gone once the weight is ordinary floating point.
_QUANTIZED = re.compile(r"(_scale_inv|_scale|_scales|_blocks|_zero_point|weight_packed|weight_shape|input_scale)$")
_LEGACY = ((re.compile(r"\.gamma$"), ".weight"), (re.compile(r"\.beta$"), ".bias"))


@dataclass(frozen=True)
class Promise:
    """What the model says of its own files.

    Attributes:
        aliases: Names of tensors that are written under another name because they are the same tensor.
        unloaded: Patterns of tensors that the model class is known not to load (transformers'
            ``_keys_to_ignore_on_load_unexpected``).
        prefix: transformers' ``base_model_prefix``.
        architectures: Class names that ``config.json`` will name.
        vocab_size: Of the model's configuration, where it has one.
    """

    aliases: frozenset[str] = frozenset()
    unloaded: tuple[str, ...] = ()
    prefix: str = ""
    architectures: tuple[str, ...] = ()
    vocab_size: int | None = None


@dataclass(frozen=True)
class Proof:
    """The outcome.

    Attributes:
        passed: Tensors of the base that the model class does not load and the export carries over.
        differences: What contradicts; empty for a good export.
    """

    passed: tuple[str, ...] = ()
    differences: tuple[str, ...] = ()


def promise_of(parts: Sequence[nn.Module], tensors: Iterable[NamedTensor]) -> Promise:
    """Collect what a rank's model parts say. Local."""
    aliases = frozenset(alias for named in tensors for alias in named.aliases)
    module = unwrap(parts[0])
    config = getattr(module, "config", None)
    text = getattr(config, "text_config", None) or config
    size = getattr(text, "vocab_size", None)
    return Promise(
        aliases,
        tuple(str(p) for p in getattr(module, "_keys_to_ignore_on_load_unexpected", None) or ()),
        str(getattr(module, "base_model_prefix", "") or ""),
        (type(module).__name__.removeprefix("FSDP"),),
        size if isinstance(size, int) else None,
    )


def prove(specs: Sequence[TensorSpec], base: BaseModel, promise: Promise, *, pass_through: bool) -> Proof:
    """Compare what will be written with the base model's headers. Pure but for reading the base's config.json.

    Args:
        specs: The union of all ranks' tensors, under the names of the files.
        base: The base model.
        promise: What the model says of its files.
        pass_through: Whether tensors that the class does not load are carried over.
    """
    written = {spec.name: spec for spec in specs}
    config = _base_config(base.directory)
    same = _same_architecture(config, promise)
    differences = [
        difference
        for name, spec in written.items()
        if name in base.specs and (difference := _differs(spec, base.specs[name], config, promise))
    ]
    absent = [name for name in base.specs if name not in written and not _accounted(name, written, promise, config)]
    passed = [name for name in absent if any(re.search(p, name) for p in promise.unloaded)]
    if same:
        lost = [name for name in absent if name not in passed]
        differences += [f"{name}: the base model ships it, the export lacks it" for name in lost]
    return Proof(tuple(passed) if same and pass_through else (), tuple(differences))


def _differs(spec: TensorSpec, known: TensorSpec, config: Mapping[str, object], promise: Promise) -> str | None:
    quantized = bool(config.get("quantization_config"))
    if spec.shape != known.shape and not (quantized or _resized(spec, known, promise)):
        return f"{spec.name}: shape {list(spec.shape)}, in the base model {list(known.shape)}"
    if spec.dtype != known.dtype and not quantized:
        return f"{spec.name}: dtype {spec.dtype}, in the base model {known.dtype}"
    return None


def _resized(spec: TensorSpec, known: TensorSpec, promise: Promise) -> bool:
    """Whether the only difference is a vocabulary that was resized, as the model's configuration says too."""
    if len(spec.shape) != len(known.shape) or spec.shape[1:] != known.shape[1:] or promise.vocab_size is None:
        return False
    return spec.shape[0] == promise.vocab_size


def _accounted(name: str, written: Mapping[str, TensorSpec], promise: Promise, config: Mapping[str, object]) -> bool:
    """Whether a tensor of the base is in the export under another name, or needs not be."""
    if name in promise.aliases:
        return True
    if config.get("quantization_config") and _QUANTIZED.search(name):
        return True
    plain = name
    for pattern, replacement in _LEGACY:
        plain = pattern.sub(replacement, plain)
    prefix = f"{promise.prefix}." if promise.prefix else ""
    candidates = (plain, prefix + plain, plain.removeprefix(prefix))
    return any(candidate in written or candidate in promise.aliases for candidate in candidates)


def _base_config(directory: Path) -> Mapping[str, object]:
    path = directory / "config.json"
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_bytes())
    except ValueError:
        # The base is somebody else's; a config that cannot be read promises nothing.
        return {}
    return found if isinstance(found, dict) else {}


def _same_architecture(config: Mapping[str, object], promise: Promise) -> bool:
    named = config.get("architectures")
    return isinstance(named, list) and set(map(str, named)) == set(promise.architectures)


def require(proof: Proof, path: Path) -> None:
    """Raise if there are differences.

    Raises:
        ExportMismatchError: Lists them.
    """
    if not proof.differences:
        return
    more = len(proof.differences) - _SHOWN
    listed = "; ".join(proof.differences[:_SHOWN]) + (f"; and {more} more" if more > 0 else "")
    raise ExportMismatchError(
        f"the export would differ from what the base model promises: {listed}",
        path=path,
        tensor=proof.differences[0].partition(":")[0],
        hint="Nothing is published. Set verify_export to false if this is what you want.",
    )


def read_back(directory: Path, specs: Sequence[TensorSpec], group: Group) -> None:
    """Compare the written files' headers and index with the plan. All ranks of the group call.

    Raises:
        ExportMismatchError: A tensor is absent, surplus, or of another shape or dtype.
    """
    source = open_source(directory, group)
    planned = {spec.name: spec for spec in specs}
    differences = [f"{name}: not in the files" for name in planned if name not in source.tensors]
    for name, tensor in source.tensors.items():
        if name not in planned:
            differences.append(f"{name}: in the files, but not planned")
        elif tensor.spec != planned[name]:
            differences.append(f"{name}: {tensor.spec} in the files, {planned[name]} planned")
    with group.together(f"comparing {directory} with its plan"):
        require(Proof((), tuple(differences)), directory)
