"""A base model as what a load reads from (`shardwise.engine.load.LoadSource`).

It may be in another dtype, may come as ``.bin`` files, and may be quantized. Then its settings are parsed here, values
are grouped with scales, and they are read dequantized. Formats, and where they are from:

* block-scaled FP8 (``quant_method: fp8``): ``X.weight`` F8_E4M3 beside ``X.weight_scale_inv``; DeepSeek-V3's
  ``README_WEIGHTS.md``, and transformers' fine-grained FP8 for fused experts;
* MXFP4 (``quant_method: mxfp4``): ``X_blocks`` and ``X_scales``, both U8; OpenAI's gpt-oss;
* FP8 of compressed-tensors (``format: float-quantized``): ``X.weight`` beside ``X.weight_scale``, one for the tensor,
  for each row, or for each block.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import cast

import torch

from shardwise.dtypes import FLOATS, torch_dtype
from shardwise.engine.load import LoadOptions, LoadSource
from shardwise.engine.name_suggestions import listed
from shardwise.engine.sharing import Made, PlannedReads, Replicas
from shardwise.errors import DtypeMismatchError, MissingTensorError, QuantizationError, ShapeMismatchError
from shardwise.geometry import Box, TensorSpec
from shardwise.plan.fragments import Fragment, HeldTensor, part_in_box
from shardwise.plan.quantized import (
    Quantized,
    QuantizedPiece,
    Slab,
    byte_box,
    dequantize,
    plan_slabs,
    plan_small_slabs,
    scales_to_float,
)
from shardwise.plan.reads import SourceTensor, plan_reads
from shardwise.sources.reader import Reader
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


# --- quantized tensors -----------------------------------------------------------------------------------------------


_SCALED_FP8 = frozenset({"F8_E4M3", "F8_E5M2"})
#: Pieces of a MiB each whose values are held at a time.
_MOST_ABREAST = 4
_SCALE_SUFFIXES = ("_scale_inv", "_scale")
SUPPORTED = "block-scaled FP8 (fp8), mxfp4, and compressed-tensors with 8-bit float weights"


@dataclass(frozen=True, slots=True)
class QuantSettings:
    """The content of a ``quantization_config``."""

    method: str  #: ``quant_method``, with the format behind it where one method has several.
    supported: bool  #: Whether it can be dequantized here.
    block: tuple[int, int] | None = None  #: Sizes of blocks along the last two dimensions, where they are declared.


def quant_settings(config: Mapping[str, object]) -> QuantSettings | None:
    """What the base's ``config.json`` says about quantization; ``None`` where it says nothing."""
    found = quantization_config(config)
    if found is None:
        return None
    # Settings of old bitsandbytes models name no method: as transformers takes them.
    old = any(found.get(key) for key in ("load_in_4bit", "load_in_8bit"))
    unnamed = "bitsandbytes" if old else "a method that its config.json does not name"
    method = str(found.get("quant_method") or unnamed)
    if method == "fp8":
        return QuantSettings(method, True, _pair(found.get("weight_block_size")))
    if method == "mxfp4":
        return QuantSettings(method, True)
    if method == "compressed-tensors":
        kind = str(found.get("format", "unnamed"))
        groups = found.get("config_groups")
        weights = [g.get("weights") for g in groups.values()] if isinstance(groups, dict) else []
        known = [w for w in weights if isinstance(w, dict)]
        eight = all(w.get("type") == "float" and w.get("num_bits") == 8 for w in known)
        # Zero points and sparsity masks are further tensors, without which the values would be wrong.
        floats = eight and all(w.get("symmetric") is not False for w in known) and len(known) == len(weights)
        sparsity = found.get("sparsity_config")
        sparse = sparsity.get("format") if isinstance(sparsity, dict) else None
        kind = kind if sparse in (None, "dense") else str(sparse)
        blocks = [w.get("block_structure") for w in known]
        block = _pair(blocks[0]) if blocks else None
        return QuantSettings(f"{method} ({kind})", kind in ("float-quantized", "naive-quantized") and floats, block)
    return QuantSettings(method, False)


def quantization_config(config: Mapping[str, object]) -> Mapping[str, object] | None:
    """The entry of a base's ``config.json`` about quantization, wherever it is; ``None`` where there is none."""
    places = [config, *(v for k, v in config.items() if k in ("text_config", "llm_config") and isinstance(v, dict))]
    for place in places:
        for key in ("quantization_config", "compression_config"):
            found = place.get(key)
            if isinstance(found, dict):
                return cast(Mapping[str, object], found)
    return None


def _pair(value: object) -> tuple[int, int] | None:
    if value is None:
        return None
    if not isinstance(value, list) or len(value) != 2 or not all(isinstance(n, int) and n > 0 for n in value):
        raise QuantizationError(
            f"blocks of size {value!r} are not a pair of positive integers", hint="Correct the base's config.json."
        )
    return (value[0], value[1])


def find_quantized(
    tensors: Mapping[str, SourceTensor], block: tuple[int, int] | None = None
) -> tuple[dict[str, Quantized], frozenset[str]]:
    """Find the quantized tensors of a source by name and dtype.

    They are returned under the names that they have once dequantized, with the names of all stored tensors behind them.
    Block sizes that are not declared follow from the shapes.
    """
    found: dict[str, Quantized] = {}
    behind: set[str] = set()
    for name, tensor in tensors.items():
        stem = name.removesuffix("_blocks")
        if stem != name and tensor.spec.dtype == "U8" and f"{stem}_scales" in tensors:
            found[stem] = _mxfp4(stem, tensor, tensors[f"{stem}_scales"])
            behind.update((name, f"{stem}_scales"))
        elif tensor.spec.dtype in _SCALED_FP8:
            for suffix in _SCALE_SUFFIXES:
                if name + suffix in tensors:
                    found[name] = _fp8(name, tensor, tensors[name + suffix], block)
                    behind.update((name, name + suffix))
                    break
    return found, frozenset(behind)


def _mxfp4(name: str, blocks: SourceTensor, scales: SourceTensor) -> Quantized:
    shape = blocks.spec.shape
    if len(shape) < 3 or scales.spec.shape != shape[:-1] or scales.spec.dtype not in ("U8", "F8_E8M0"):
        raise QuantizationError(
            f"blocks of shape {list(shape)} and scales of shape {list(scales.spec.shape)} do not fit together",
            tensor=name,
            hint="The base is damaged, or of another MXFP4 layout; fetch it again.",
        )
    stored = (*shape[:-2], shape[-2] * shape[-1] * 2)
    values = _reshaped(blocks, (*shape[:-2], shape[-2] * shape[-1]))
    block = (*(1 for _ in shape[:-2]), shape[-1] * 2)
    return Quantized(TensorSpec(name, stored, "F32"), values, scales, block, packed=True)


def _fp8(name: str, values: SourceTensor, scales: SourceTensor, declared: tuple[int, int] | None) -> Quantized:
    shape, grid = values.spec.shape, scales.spec.shape
    if scales.spec.numel == 1:
        grid = (1,) * len(shape)
    grid = grid + (1,) * (len(shape) - len(grid))
    wanted = (0,) * (len(shape) - 2) + declared if declared and len(shape) >= 2 else (0,) * len(shape)
    block = []
    if len(grid) == len(shape):
        block = [_block(n, s, b) for n, s, b in zip(shape, grid, wanted, strict=True)]
    if (not block and shape) or 0 in block:
        raise QuantizationError(
            f"scales of shape {list(scales.spec.shape)} do not fit values of shape {list(shape)}",
            tensor=name,
            hint="Check weight_block_size in the base's config.json, or fetch the base again.",
        )
    return Quantized(TensorSpec(name, shape, "F32"), values, _reshaped(scales, grid), tuple(block))


def _block(size: int, scales: int, declared: int) -> int:
    """Values for each scale along one dimension; 0 if the numbers do not fit."""
    if declared and -(-size // declared) == scales:
        return declared
    if scales == 1:
        return max(size, 1)
    if size % scales == 0:
        return size // scales
    return 128 if -(-size // 128) == scales else 0


def _reshaped(tensor: SourceTensor, shape: tuple[int, ...]) -> SourceTensor:
    """The same bytes under another shape."""
    if tensor.spec.shape == shape:
        return tensor
    if len(tensor.chunks) != 1 or tensor.chunks[0].box != Box.whole(tensor.spec.shape):
        raise QuantizationError(
            "a quantized tensor that is itself saved in pieces cannot be dequantized",
            tensor=tensor.spec.name,
            hint="Merge the checkpoint into ordinary files first.",
        )
    chunk = tensor.chunks[0]._replace(box=Box.whole(shape))
    return SourceTensor(tensor.spec._replace(shape=shape), (chunk,))


def fitted(tensor: Quantized, shape: tuple[int, ...], path: object) -> Quantized:
    """The quantized tensor in the orientation of the model's, whose shape is given.

    gpt-oss stores experts' matrices as (experts, out, in), and transformers' model has (experts, in, out). Where both
    orientations have the model's shape, the stored one is the other one, as in transformers' own conversion.
    """
    candidates = [tensor.turned(), tensor] if tensor.packed else [tensor]
    for candidate in candidates:
        if candidate.spec.shape == shape:
            return candidate
    raise ShapeMismatchError(
        f"the model's shape is {list(shape)}, that of the dequantized base {list(candidates[0].spec.shape)}",
        path=path,
        tensor=tensor.spec.name,
        hint="Build the model from the base's own config.json.",
    )


def read_dequantized(tensor: Quantized, wanted: HeldTensor, reader: Reader) -> None:
    """Fill the fragments of ``wanted``, which has the shape of ``tensor``, from the values and scales they need.

    Extra memory: about 20 MiB, whatever the size of the tensor.
    """
    for slab in plan_slabs(tensor, wanted):
        scales = _read_scales(tensor, slab, reader)
        # In this order pieces of the same rows are read in one pass; a rank has two in most packed placements.
        pieces = sorted(slab.pieces, key=lambda piece: piece.box.offsets)
        with torch.no_grad():
            for at in range(0, len(pieces), _MOST_ABREAST):
                abreast = pieces[at : at + _MOST_ABREAST]
                for piece, raw in zip(abreast, _read_values(tensor, abreast, reader), strict=True):
                    piece.dest.copy_(dequantize(raw, scales, tensor, piece.box, slab.around))


def dequantized_pieces(tensor: Quantized, wanted: HeldTensor, most: int) -> Iterator[Made]:
    """What `read_dequantized` does in pieces of at most ``most`` bytes in memory, for replicas to share."""
    itemsize = next((fragment.data.element_size() for fragment in wanted.fragments), 1)
    for slab in plan_small_slabs(tensor, wanted, max(1, most // itemsize)):
        [piece] = slab.pieces
        if piece.dest.numel():
            yield Made(piece.dest, partial(_fill, tensor, slab))


def _fill(tensor: Quantized, slab: Slab, memory: torch.Tensor, reader: Reader) -> None:
    [piece] = slab.pieces
    scales = _read_scales(tensor, slab, reader)
    [raw] = _read_values(tensor, [piece], reader)
    memory.copy_(dequantize(raw, scales, tensor, piece.box, slab.around))


def _read_scales(tensor: Quantized, slab: Slab, reader: Reader) -> torch.Tensor:
    spec = tensor.scales.spec
    stored = torch.empty(slab.around.sizes, dtype=torch_dtype(spec.dtype))
    fragments = tuple(Fragment(box, part_in_box(stored, box.relative_to(slab.around))) for box in slab.scales)
    reader.execute(list(plan_reads(tensor.scales, HeldTensor.alone(spec, fragments))))
    return scales_to_float(stored)


def _read_values(tensor: Quantized, pieces: Sequence[QuantizedPiece], reader: Reader) -> list[torch.Tensor]:
    spec = tensor.values.spec
    boxes = [byte_box(piece.box) if tensor.packed else piece.box for piece in pieces]
    raws = [torch.empty(box.sizes, dtype=torch_dtype(spec.dtype)) for box in boxes]
    fragments = tuple(Fragment(box, raw) for box, raw in zip(boxes, raws, strict=True))
    reader.execute(list(plan_reads(tensor.values, HeldTensor.alone(spec, fragments))))
    return raws
