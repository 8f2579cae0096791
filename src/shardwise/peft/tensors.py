"""The content of an adapter checkpoint: files, tensors, and where each tensor lies in this rank's parameters."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

import torch
import torch.nn as nn

from shardwise.dtypes import dtype_code
from shardwise.geometry import TensorSpec
from shardwise.plan.views import Axis, AxisView
from shardwise.stateful_wrappers.wrapping import plain_path

#: Source: ``peft.utils.constants`` (``SAFETENSORS_WEIGHTS_NAME``, ``CONFIG_NAME``).
ADAPTER_WEIGHTS_NAME = "adapter_model.safetensors"
ADAPTER_CONFIG_NAME = "adapter_config.json"

#: Tensors that are trained beside an adapter and that peft does not count to it; this library's own file.
ADAPTER_EXTRA_NAME = "adapter_extra.safetensors"

#: Prefix of every tensor that peft saves: ``PeftModel`` holds a tuner, ``base_model``, and that the model, ``model``.
PEFT_PREFIX = "base_model.model."


@dataclass(frozen=True, slots=True, eq=False)
class AdapterEntry:
    """One tensor of an adapter file, and the parameter behind it. A source when saving, a destination when loading."""

    spec: TensorSpec  #: Name, global shape and dtype in the file.
    fqn: str  #: Name of the parameter in the model, without wrappers' prefixes.
    tensor: torch.Tensor  #: The parameter: a plain tensor, which is whole, or a DTensor.
    view: AxisView | None = None  #: How the file's tensor looks into the parameter; ``None`` where both are the same.
    #: Name of the earlier entry that has the same memory (one ``lora_A`` behind a combined projection); such tensors
    #: are equal in every file that can be loaded.
    alias_of: str | None = None

    @property
    def grid(self) -> tuple[int, ...]:
        """The refinement of the tensor's shape that its boxes are given in."""
        return self.spec.shape if self.view is None else self.view.hub_grid


@dataclass(frozen=True, slots=True, eq=False)
class AdapterFile:
    """One adapter."""

    adapter_name: str  #: peft's name of it; ``default`` for a model's own LoRA modules.
    entries: tuple[AdapterEntry, ...]  #: What this rank knows of its tensors.

    @property
    def directory(self) -> str:
        """Where it lies below the checkpoint's ``model`` directory, as in ``PeftModel.save_pretrained``."""
        return "" if self.adapter_name == "default" else self.adapter_name

    @property
    def path(self) -> str:
        """Path of the file below the ``model`` directory."""
        return str(PurePosixPath(self.directory) / ADAPTER_WEIGHTS_NAME)


@dataclass(frozen=True, slots=True, eq=False)
class AdapterTensors:
    """All adapters of a model, as one rank holds them."""

    files: tuple[AdapterFile, ...]  #: One for each adapter, in the model's order.
    #: Which layers this rank's parts have, for `shardwise.peft.check.check_adapter`: path of a list or dictionary of
    #: numbered modules -> their numbers.
    inventory: dict[str, tuple[int, ...]]
    layers: int | None = None  #: Number of transformer layers that the model's configuration promises, where it does.
    #: Those of `inventory` that are no whole list: dictionaries, and lists with holes, as pipeline stages have.
    cut: frozenset[str] = frozenset()
    extra: tuple[AdapterEntry, ...] = ()  #: What else changes while the adapter is trained: `shardwise.peft.capture`.


def entry(
    name: str,
    fqn: str,
    tensor: torch.Tensor,
    view: AxisView | None = None,
    shape: Sequence[int] | None = None,
    alias_of: str | None = None,
) -> AdapterEntry:
    """Make an `AdapterEntry` from a parameter; ``shape`` is the file's, and the parameter's own if not given."""
    sizes = tuple(int(n) for n in (tensor.shape if shape is None else shape))
    return AdapterEntry(TensorSpec(name, sizes, dtype_code(tensor.dtype, name)), fqn, tensor, view, alias_of)


def axis_view(
    factors: Sequence[Sequence[int]],
    order: Iterable[int | tuple[int, int, int]],
    fixed: tuple[tuple[int, int], ...] = (),
) -> AxisView:
    """Describe a view by the native grid and, for each dimension of the file's grid, what it walks along.

    ``factors`` are those of each native dimension, ``order`` has a native grid dimension or ``(dimension, start,
    length)``, ``fixed`` the native grid dimensions that the file's tensor does not have, with the index that it takes.
    """
    flat = [n for group in factors for n in group]
    axes = [
        Axis(item, 0, 0, flat[item]) if isinstance(item, int) else Axis(item[0], item[1], 0, item[2]) for item in order
    ]
    return AxisView(tuple(tuple(group) for group in factors), tuple(a.length for a in axes), tuple(axes), fixed)


def join(*parts: str) -> str:
    """Join the non-empty parts of a dotted name."""
    return ".".join(part for part in parts if part)


def named_modules(part: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """As ``named_modules``, under clean names; where a wrapper and the wrapped share one, the wrapped is given."""
    yield from {plain_path(name): module for name, module in part.named_modules()}.items()


def seed_of(text: str) -> int:
    """A generator's seed that follows from a text alone."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest())


def text_config(model: object) -> object | None:
    """The configuration that describes the language model: nested in that of a multimodal one."""
    config: object | None = getattr(model, "config", None)
    nested = getattr(config, "text_config", None)
    return config if nested is None or isinstance(nested, dict) else nested
