"""`ConsolidatedHFAddon`: everything beside the weights that makes a directory a Hugging Face model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, Unpack, cast

from shardwise.addons.base import SaveHookArgs, SavesPretrained
from shardwise.addons.custom_code import _apply_transformers_compat_guards, _maybe_save_custom_model_code
from shardwise.addons.files import copy_file, write_json, written_locally
from shardwise.addons.hf_config import (
    CONFIG,
    CONFIG_V5,
    GENERATION_CONFIG,
    _save_original_config_json,
    is_transformers_config,
    localize_auto_maps,
    naming_entries,
    write_config,
    write_generation_config,
    write_hub_mixin_config,
    write_own_config,
)
from shardwise.addons.side_files import (
    write_sentence_model,
    write_sentence_transformers,
    write_tokenizer,
    write_tokenizer_for_v4,
)
from shardwise.base.files import find_directory
from shardwise.comm import Group
from shardwise.disk.names import files_under, is_directory, is_file
from shardwise.disk.storage import current
from shardwise.errors import ExportMismatchError
from shardwise.format.notes import FILE_DTYPES, FILE_INDEX, NOTES
from shardwise.stateful_wrappers.model_parts import config_of, described_part, has_quantized_parameters, written_dtype
from shardwise.stateful_wrappers.wrapping import (
    bare_model,
    is_hub_mixin,
    is_sentence_transformer,
    original_class,
    outermost_pretrained,
    unwrap,
)

if TYPE_CHECKING:
    import torch.nn as nn

_GENERATION_CONFIG_V5 = "generation_config.v5.json"


class HFMetadataExporter(Protocol):
    """The result of a model's ``_get_consolidated_hf_metadata_exporter``, which then writes all metadata itself.

    The model's method is called as ``_get_consolidated_hf_metadata_exporter(tokenizer=..., original_model_path=...)``
    and returns such an object, or ``None`` to leave the writing to `ConsolidatedHFAddon`. Then:

    1. `validate`, on every rank, before any collective of the hook and before anything is written; what it raises is
       raised as it is on that rank;
    2. `save`, on rank 0.
    """

    def validate(self, *, tokenizer: SavesPretrained | None, original_model_path: str | None) -> object:
        """Raise (or return ``False``) if the metadata cannot be written as it should be. Every rank calls."""

    def save(
        self, *, hf_metadata_dir: str, tokenizer: SavesPretrained | None, original_model_path: str | None
    ) -> object:
        """Write config, tokenizer and whatever else the model needs into ``hf_metadata_dir``, which exists. Rank 0."""


class ConsolidatedHFAddon:
    """Addon that writes consolidated Hugging Face metadata alongside sharded weights.

    On rank 0, `pre_save` writes ``config.json``, ``generation_config.json``, the tokenizer or processor, custom model
    code and sentence-transformers' side files into ``hf_metadata_dir``, and `post_save` copies them to
    ``consolidated_path``. Ranks leave each hook together, and what fails on rank 0 is raised on all of them.
    """

    def pre_save(self, **kwargs: Unpack[SaveHookArgs]) -> None:
        """Pre-save hook to emit consolidated HF artifacts. All ranks call.

        A model without a Hugging Face config gets no config; a tokenizer that was passed and the two mappings are
        written for any model. The model's own config is not changed.

        Args:
            **kwargs: See `SaveHookArgs`. Without ``hf_metadata_dir`` nothing is written.

        Raises:
            ShardwiseError: What failed on rank 0.
            Exception: What the model's own exporter refuses the export with, on the rank where it does.
        """
        group = kwargs.get("group") or Group.current()
        if kwargs.get("hf_metadata_dir") is None:
            return
        exporter = own_exporter(kwargs)
        with group.together("looking for quantization") as quantized:
            quantized.flag = is_quantized(kwargs)
        with group.together("writing the Hugging Face metadata"):
            if group.rank == 0:
                write_metadata(kwargs, quantized.any, exporter)

    def post_save(self, **kwargs: Unpack[SaveHookArgs]) -> None:
        """Copy the saved HF metadata to the consolidated directory. All ranks call.

        The metadata stays in ``hf_metadata_dir`` too, so that a later offline export has the configuration that
        training ended with. The two mappings are for that export only and are not copied.

        Args:
            **kwargs: See `SaveHookArgs`. Without ``consolidated_path`` nothing is copied.

        Raises:
            ShardwiseError: What failed on rank 0.
        """
        group = kwargs.get("group") or Group.current()
        if kwargs.get("hf_metadata_dir") is None or kwargs.get("consolidated_path") is None:
            return
        with group.together("copying the Hugging Face metadata"):
            if group.rank == 0:
                copy_metadata(kwargs)


def _parts(args: SaveHookArgs) -> list[nn.Module]:
    return list(args["model_state"].model) if "model_state" in args else []


def is_quantized(args: SaveHookArgs) -> bool:
    """Whether this rank holds quantized parameters. Stages may differ; the config says so if any rank does."""
    return any(has_quantized_parameters(bare_model(part).modules()) for part in _parts(args))


def copy_metadata(args: SaveHookArgs) -> None:
    """The work of `ConsolidatedHFAddon.post_save` on rank 0: copy all but what is for resuming. Local."""
    source, target = args.get("hf_metadata_dir"), args.get("consolidated_path")
    if source is None or target is None or not is_directory(Path(source)):
        return
    for path in files_under(Path(source)):
        relative = path.relative_to(source)
        if relative.as_posix() not in NOTES:
            copy_file(path, Path(target) / relative)


def write_metadata(args: SaveHookArgs, quantized: bool, exporter: HFMetadataExporter | None) -> None:
    """The work of `ConsolidatedHFAddon.pre_save` on rank 0; ``quantized``: any rank has such parameters. Local."""
    target = args.get("hf_metadata_dir")
    if target is None:
        return
    directory, parts = Path(target), _parts(args)
    model = described_part(parts)
    tokenizer = args.get("tokenizer")
    base_path = args.get("original_model_path")
    _write_mappings(directory, args)
    if exporter is not None:
        with written_locally(directory) as local:
            exporter.save(hf_metadata_dir=str(local), tokenizer=tokenizer, original_model_path=base_path)
        return
    config = None if model is None else config_of(model)
    describes_itself = config is not None or (model is not None and is_hub_mixin(model))
    base = find_directory(base_path) if describes_itself else None
    v4 = args.get("v4_compatible", False)
    write_tokenizer(tokenizer, base, directory)
    if v4:
        write_tokenizer_for_v4(directory, base)
    if model is None or not describes_itself:
        return
    current().make_directory(directory)
    _maybe_save_custom_model_code(base_path, str(directory), model)
    if is_transformers_config(config):
        dtype = written_dtype([bare_model(part) for part in parts], args.get("fqn_to_dtype_mapping"))
        _write_configs(model, directory, base, dtype, keep_quantization=quantized, v4=v4)
    elif is_hub_mixin(model):
        write_hub_mixin_config(model, directory)
    else:
        with naming_entries(model, config):
            write_own_config(model, config, directory, keep_quantization=quantized)
    around = next((each for part in parts if is_sentence_transformer(each := unwrap(part))), None)
    if around is None:
        write_sentence_transformers(base, directory)
    else:
        write_sentence_model(around, directory, with_tokenizer=tokenizer is None)
    localize_auto_maps(directory)
    for path in (path for path in files_under(directory) if path.suffix == ".py"):
        _apply_transformers_compat_guards(str(path))


def why_no_config(parts: Sequence[nn.Module]) -> str:
    """Message for an export without ``config.json``: the reason, and what to do."""
    model = described_part(parts)
    if model is None:
        return "this rank has no part of the model"
    cls = original_class(model).__name__
    inside = [
        f"{path} ({original_class(inner).__name__})"
        for part in parts
        for path, inner in outermost_pretrained(bare_model(part))
    ]
    if inside:
        return (
            f"{cls} has no config, but a model inside it has one: {', '.join(inside[:3])}. Save that model by itself, "
            f"or give {cls} a property `config` that returns its config"
        )
    return (
        f"{cls} has no config that could be written. Give it one, as `model.config`, if others are to open the export"
    )


def _write_configs(
    model: nn.Module, directory: Path, base: Path | None, dtype: str | None, *, keep_quantization: bool, v4: bool
) -> None:
    """Write config and generation config: the ones in memory, or in v4 mode the base model's with those beside them."""
    theirs = [name for name in (CONFIG, GENERATION_CONFIG) if v4 and base is not None and is_file(base / name)]
    for name in theirs:
        _save_original_config_json(str(base), str(directory), name, keep_quantization=keep_quantization)
    config = directory / (CONFIG_V5 if CONFIG in theirs else CONFIG)
    generation = directory / (_GENERATION_CONFIG_V5 if GENERATION_CONFIG in theirs else GENERATION_CONFIG)
    v4_names = v4 and CONFIG not in theirs
    write_config(model, config, dtype, keep_quantization=keep_quantization, v4_names=v4_names)
    write_generation_config(model, generation, base)


def own_exporter(args: SaveHookArgs) -> HFMetadataExporter | None:
    """The model's own exporter, validated, or ``None``. Every rank calls, before any collective; local.

    What its ``validate`` raises is raised; ``False`` is an `ExportMismatchError`.
    """
    model = described_part(_parts(args))
    make = getattr(model, "_get_consolidated_hf_metadata_exporter", None)
    if not callable(make):
        return None
    tokenizer, base_path = args.get("tokenizer"), args.get("original_model_path")
    exporter = cast("HFMetadataExporter | None", make(tokenizer=tokenizer, original_model_path=base_path))
    if exporter is not None and exporter.validate(tokenizer=tokenizer, original_model_path=base_path) is False:
        raise ExportMismatchError(
            f"the metadata exporter of {type(model).__name__} refuses to export the model",
            hint="See what its validate() checks.",
        )
    return exporter


def _write_mappings(directory: Path, args: SaveHookArgs) -> None:
    files, dtypes = args.get("fqn_to_file_index_mapping"), args.get("fqn_to_dtype_mapping")
    if files is not None:
        write_json(directory / FILE_INDEX, dict(files))
    if dtypes is not None:
        write_json(directory / FILE_DTYPES, dict(dtypes))
