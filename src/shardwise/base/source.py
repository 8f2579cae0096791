"""A base model as what a load reads from (`shardwise.engine.load.LoadSource`).

It may be quantized, may be in another dtype, and may come as ``.bin`` files.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from shardwise.base.quantized import SUPPORTED, QuantSettings, dequantized_pieces, fitted, read_dequantized
from shardwise.dtypes import FLOATS
from shardwise.engine.load import LoadOptions, LoadSource
from shardwise.engine.name_suggestions import listed
from shardwise.engine.sharing import PlannedReads, Replicas
from shardwise.errors import DtypeMismatchError, MissingTensorError, QuantizationError, ShapeMismatchError
from shardwise.geometry import TensorSpec
from shardwise.plan.fragments import HeldTensor
from shardwise.plan.quantized import Quantized
from shardwise.sources.torch_files import BinSource
from shardwise.stateful_wrappers.memory import require_own_elements

#: Dtypes whose values are cast to floating point without asking, where they have no scales.
_FP8 = frozenset({"F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ"})


@dataclass(frozen=True)
class BaseSource(LoadSource):
    """The tensors of a base model; ``plain`` are those that are stored, as far as byte ranges read them."""

    bins: BinSource | None = None  #: The ``.bin`` files behind it, where there are any.
    #: Tensors that exist once values and scales are multiplied; empty where that is not wanted.
    quantized: Mapping[str, Quantized] = field(default_factory=dict)
    behind: frozenset[str] = frozenset()  #: Names of the stored tensors from which ``quantized`` is computed.
    #: Names of stored values whose scales are at hand, whether or not they are to be multiplied.
    scaled: frozenset[str] = frozenset()
    settings: QuantSettings | None = None  #: What its config says about quantization.

    @property
    def path(self) -> Path:
        """What was opened."""
        return self.plain.path

    @property
    def loose(self) -> Mapping[str, tuple[TensorSpec, Path]]:
        """Tensors of ``.bin`` files that byte ranges cannot read."""
        return {} if self.bins is None else self.bins.loose

    def names(self) -> Collection[str]:
        """All names that a model may want: those of stored tensors, and of dequantized ones."""
        return dict.fromkeys((*self.plain.tensors, *self.loose, *self.quantized)).keys()

    def stored(self, name: str) -> TensorSpec | None:
        """What a stored tensor is, or ``None``."""
        found = self.plain.tensors.get(name)
        if found is not None:
            return found.spec
        return self.loose[name][0] if name in self.loose else None

    def dequantizes(self, spec: TensorSpec) -> bool:
        """Whether a tensor of the model is computed from values and scales."""
        return spec.name in self.quantized and spec.dtype in FLOATS

    def unexpected(self, unwanted: Sequence[str], options: LoadOptions) -> list[str]:
        """Those from which no dequantized tensor is computed."""
        return [name for name in unwanted if name not in self.behind]

    def compare(
        self, specs: Sequence[TensorSpec], unexpected: Sequence[str], options: LoadOptions, *, dtypes: bool = True
    ) -> None:
        """Compare names, shapes and dtypes: floating-point values are cast, and further tensors let pass.

        Tensors that the base lacks are named with the nearest name that it has to offer.
        """
        _refuse_unsupported(specs, self)
        available = self.names()
        missing = [spec for spec in specs if spec.name not in available]
        if missing and not options.allow_missing:
            raise _missing(missing, unexpected, self)
        for spec in specs:
            if spec.name in available:
                _compare(spec, self)

    def add(self, tensor: HeldTensor, reads: PlannedReads, replicas: Replicas | None) -> None:
        """Plan byte ranges, blocks and scales, or the file that has to be opened.

        Replicas share what they dequantize; what they need of a file that has to be opened each copies by itself.
        """
        name = tensor.spec.name
        if self.dequantizes(tensor.spec):
            if not any(fragment.box.numel for fragment in tensor.fragments):
                return
            quantized = fitted(self.quantized[name], tensor.spec.shape, self.path)
            alone = reads.add_made(tensor, replicas, partial(dequantized_pieces, quantized))
            elements = sum(fragment.box.numel for fragment in alone.fragments)
            if alone.parts:
                reads.computed.append(partial(read_dequantized, quantized, alone))
                reads.made_bytes += elements // 2 if quantized.packed else elements
            return
        if name in self.plain.tensors:
            super().add(tensor, reads, replicas)
        elif self.bins is not None and tensor.fragments:
            for fragment in tensor.fragments:
                require_own_elements(name, fragment.data)
            reads.opened.setdefault((self.loose[name][1], self.bins.legacy), []).append(tensor)


def _refuse_unsupported(wanted: Sequence[TensorSpec], source: BaseSource) -> None:
    settings = source.settings
    if settings is None or settings.supported:
        return
    for spec in wanted:
        stored = source.stored(spec.name)
        if stored is None or (spec.dtype in FLOATS and stored.dtype not in FLOATS):
            raise QuantizationError(
                f"the base model is quantized by {settings.method}, which cannot be dequantized on loading",
                path=source.path,
                hint=f"Use an unquantized base, or one quantized by {SUPPORTED}.",
            )


def _compare(spec: TensorSpec, source: BaseSource) -> None:
    if source.dequantizes(spec):
        fitted(source.quantized[spec.name], spec.shape, source.path)
        return
    stored = source.stored(spec.name)
    if stored is None:
        raise DtypeMismatchError(
            f"the model's dtype is {spec.dtype}, and the base holds this tensor quantized",
            path=source.path,
            tensor=spec.name,
            hint="Build the model in a floating-point dtype.",
        )
    if stored.shape != spec.shape:
        raise ShapeMismatchError(
            f"the model's shape is {list(spec.shape)}, the base's {list(stored.shape)}",
            path=source.path,
            tensor=spec.name,
            hint="Build the model from the base's own config.json, or name a task head that is to keep its fresh "
            "values in skip_task_head_prefixes_for_base_model.",
        )
    scaled = spec.name in source.scaled
    is_cast = spec.dtype in FLOATS and (stored.dtype in FLOATS or (stored.dtype in _FP8 and not scaled))
    if stored.dtype == spec.dtype or is_cast:
        return
    raise DtypeMismatchError(
        f"the model's dtype is {spec.dtype}, the base's {stored.dtype}" + (" with scales beside it" if scaled else ""),
        path=source.path,
        tensor=spec.name,
        hint="Set dequantize_base_checkpoint=True." if scaled else "Build the model in the base's dtype.",
    )


def _missing(specs: Sequence[TensorSpec], unexpected: Sequence[str], source: BaseSource) -> MissingTensorError:
    """The error that lists what is missing, the first ones with the nearest name that nobody wants."""
    names = [spec.name for spec in specs]
    shapes = {spec.name: spec.shape for spec in specs}
    for name in unexpected:
        stored = source.stored(name)
        # Of a quantized tensor the stored shape may be that of packed values.
        if stored is not None and name not in source.quantized:
            shapes.setdefault(name, stored.shape)
    prefix = names[0].split(".")[0] + "."
    hint = "Map names with key_mapping, or build the model from the base's own config.json"
    if not any(name.startswith(prefix) for name in source.names()):
        # Whoever skips the prefix of a whole model trains one of random values.
        hint += (
            ", or, for a task head that is to keep its fresh values, set "
            f"skip_task_head_prefixes_for_base_model=[{prefix!r}]"
        )
    return MissingTensorError(
        f"the base model lacks {len(names)} of the model's tensors: "
        + listed(names, unexpected or source.names(), "the base has", shapes),
        path=source.path,
        tensor=names[0],
        hint=f"{hint}.",
    )
