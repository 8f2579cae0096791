"""`ConsolidatedHFAddon`: everything beside the weights that makes a directory a Hugging Face model."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Protocol, Unpack, cast

from shardwise.addons.base import SaveHookArgs, SavesPretrained
from shardwise.addons.custom_code import _apply_transformers_compat_guards, _maybe_save_custom_model_code
from shardwise.addons.files import copy_file, write_json, write_text, written_locally
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
from shardwise.base.files import find_directory
from shardwise.comm import Group, JsonValue
from shardwise.disk.names import exists, files_under, is_directory, is_file, names_in
from shardwise.disk.storage import current
from shardwise.errors import ExportMismatchError, FormatError
from shardwise.format.json_file import read_json, read_json_object
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
from shardwise.upstream.hugging_face import model_settings

if TYPE_CHECKING:
    import torch.nn as nn

_LOG = logging.getLogger(__name__)

_GENERATION_CONFIG_V5 = "generation_config.v5.json"

#: Files of tokenizers, as transformers' tokenizer classes name them (``vocab_files_names``).
_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "vocab.txt", "merges.txt", "*.model", "*.spm", "*.tiktoken", "*.codes", "emoji.json", "entity_vocab.json",
    "normalizer.json", "sentencepiece.*", "spiece.*", "tekken.json", "tokenizer_config.*.json",
)  # fmt: skip

#: Files of processors (transformers.utils: the ``*_NAME`` constants).
_PROCESSOR_FILES = (
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "audio_tokenizer_config.json",
)

_TEMPLATES = ("chat_template.jinja", "chat_template.json")
_TEMPLATE_FOLDER = "additional_chat_templates"

_SENTENCE_FILES = ("modules.json", "config_sentence_transformers.json", "sentence_*_config.json")


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
        What failed on rank 0 is raised on all ranks.
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
    for name, mapping in ((FILE_INDEX, "fqn_to_file_index_mapping"), (FILE_DTYPES, "fqn_to_dtype_mapping")):
        if (known := cast("Mapping[str, JsonValue] | None", args.get(mapping))) is not None:
            write_json(directory / name, dict(known))
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
        _write_tokenizer_for_v4(directory, base)
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
        _write_sentence_transformers(base, directory)
    else:
        _write_sentence_model(around, directory, with_tokenizer=tokenizer is None)
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


# --- tokenizer, processor and sentence-transformers files: from memory where they are given, else from the base -------


def write_tokenizer(tokenizer: SavesPretrained | None, base: Path | None, directory: Path) -> None:
    """Write the tokenizer or processor, and copy absent files from the base model, if there is one.

    The caller's object takes precedence. The base model's tokenizer files are copied where no tokenizer was written,
    its processor files where no processor was, its chat template where none was.
    """
    if tokenizer is not None:
        with written_locally(directory) as local:
            tokenizer.save_pretrained(str(local))
    if base is None:
        return
    if not any(exists(directory / name) for name in ("tokenizer.json", "tokenizer_config.json")):
        _copy_matching(base, directory, _TOKENIZER_FILES)
    if not any(exists(directory / name) for name in _PROCESSOR_FILES):
        _copy_matching(base, directory, _PROCESSOR_FILES)
    config = directory / "tokenizer_config.json"
    has_template = any(exists(directory / name) for name in _TEMPLATES)
    if not has_template and not (is_file(config) and read_json_object(config).get("chat_template")):
        _copy_matching(base, directory, _TEMPLATES)
        if is_directory(base / _TEMPLATE_FOLDER):
            _copy_matching(base / _TEMPLATE_FOLDER, directory / _TEMPLATE_FOLDER, ("*.jinja",))


def _write_tokenizer_for_v4(directory: Path, base: Path | None) -> None:
    """Let readers of the 4.x generation of transformers open the tokenizer that release 5 wrote into ``directory``.

    Release 5 writes its own backend class (``TokenizersBackend``) and a list under ``extra_special_tokens``; 4.x knows
    neither the class nor the list, and both generations read the older names. The base model's ``tokenizer_class`` is
    preferred.
    """
    path = directory / "tokenizer_config.json"
    if not is_file(path):
        return
    entries = read_json_object(path)
    before = dict(entries)
    if entries.get("tokenizer_class") == "TokenizersBackend":
        theirs = base / path.name if base is not None else path
        known = read_json_object(theirs).get("tokenizer_class") if is_file(theirs) else None
        usable = isinstance(known, str) and known != "TokenizersBackend"
        entries["tokenizer_class"] = known if usable else "PreTrainedTokenizerFast"
    if isinstance(entries.get("extra_special_tokens"), list):
        entries["additional_special_tokens"] = entries.pop("extra_special_tokens")
    if entries != before:
        write_json(path, entries)


def _write_sentence_transformers(base: Path | None, directory: Path) -> None:
    """Copy the side files and module folders of a base model that is a sentence-transformers model."""
    if base is None or not is_file(base / "modules.json"):
        return
    folders = _module_folders(base / "modules.json")
    if folders is None:
        _LOG.warning("sentence-transformers files are left out: %s keeps its weights in a folder of its own", base)
        return
    _copy_matching(base, directory, _SENTENCE_FILES)
    for folder in folders:
        files = [path for path in files_under(base / folder) if path.name.lower() != "readme.md"]
        for path in files:
            copy_file(path, directory / path.relative_to(base))


def _write_sentence_model(model: nn.Module, directory: Path, *, with_tokenizer: bool) -> None:
    """Write what makes a directory with a transformer's files a sentence-transformers model, and its tokenizer.

    A module with weights besides the transformer (``Dense``) has its own files, which an export lacks: then the
    directory holds only the transformer, as the log says.
    """
    modules = list(model.named_children())
    heavy = [(name, module) for name, module in modules[1:] if module.state_dict(keep_vars=True)]
    others = [f"{name} ({original_class(module).__name__})" for name, module in heavy]
    first = cast(Any, modules[0][1]) if modules else None
    if first is None or others or not callable(getattr(first, "save_config", None)):
        _LOG.warning(
            "the export is that of the transformer alone, without the sentence-transformers model around it: %s",
            f"{', '.join(others)} have weights outside of it" if others else "its first module writes no config",
        )
        return
    processor = getattr(first, "processor", None) or getattr(first, "tokenizer", None)
    listed: list[JsonValue] = []
    with written_locally(directory) as local:
        first.save_config(str(local))
        if with_tokenizer and processor is not None:
            processor.save_pretrained(str(local))
        for number, (name, module) in enumerate(modules):
            cls = original_class(module)
            folder = f"{number}_{cls.__name__}" if number else ""
            if number:
                current().make_directory(local / folder)
                cast(Any, module).save(str(local / folder))
            listed.append({"idx": number, "name": name, "path": folder, "type": f"{cls.__module__}.{cls.__name__}"})
    write_text(directory / "modules.json", json.dumps(listed, indent=2))
    settings = model_settings(model)
    if settings is not None:
        write_json(directory / "config_sentence_transformers.json", cast(Any, settings))


def _module_folders(path: Path) -> list[str] | None:
    """The folders that ``modules.json`` names, or ``None`` where the language model itself is in one of them."""
    try:
        modules = cast(list[dict[str, str]], read_json(path))
        listed = [(str(module["type"]), str(module["path"])) for module in modules]
    except (KeyError, TypeError) as error:
        raise FormatError(f"not a list of modules: {error}", path=path, hint="Restore the file.") from error
    folders = [(kind, folder) for kind, folder in listed if folder not in ("", ".")]
    for _, folder in folders:
        if PurePosixPath(folder).is_absolute() or ".." in PurePosixPath(folder).parts:
            raise FormatError(f"the module folder {folder!r} is outside the model", path=path, hint="Correct the path.")
    if any(kind.rpartition(".")[2] == "Transformer" for kind, _ in folders):
        return None
    return [folder for _, folder in folders]


def _copy_matching(base: Path, directory: Path, patterns: tuple[str, ...]) -> None:
    for name in names_in(base):
        wanted = any(fnmatch(name, each) for each in patterns) and is_file(base / name)
        if wanted and not exists(directory / name):
            copy_file(base / name, directory / name)
