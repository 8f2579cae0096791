"""Tokenizer, processor and sentence-transformers files: from memory where they are given, else from the base model."""

from __future__ import annotations

import json
import logging
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, cast

from shardwise.addons.base import SavesPretrained
from shardwise.addons.files import copy_file, write_json, write_text, written_locally
from shardwise.comm import JsonValue
from shardwise.disk.names import exists, files_under, is_directory, is_file, names_in
from shardwise.disk.storage import current
from shardwise.errors import FormatError
from shardwise.format.json_file import read_json, read_json_object
from shardwise.stateful_wrappers.wrapping import original_class
from shardwise.upstream.hugging_face import model_settings

if TYPE_CHECKING:
    import torch.nn as nn

_LOG = logging.getLogger(__name__)

#: Files of tokenizers, as transformers' tokenizer classes name them (``vocab_files_names``).
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.model",
    "*.spm",
    "*.tiktoken",
    "*.codes",
    "emoji.json",
    "entity_vocab.json",
    "normalizer.json",
    "sentencepiece.*",
    "spiece.*",
    "tekken.json",
    "tokenizer_config.*.json",
)

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
    if not _has_template(directory):
        _copy_matching(base, directory, _TEMPLATES)
        if is_directory(base / _TEMPLATE_FOLDER):
            _copy_matching(base / _TEMPLATE_FOLDER, directory / _TEMPLATE_FOLDER, ("*.jinja",))


def write_tokenizer_for_v4(directory: Path, base: Path | None) -> None:
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


def write_sentence_transformers(base: Path | None, directory: Path) -> None:
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


def write_sentence_model(model: nn.Module, directory: Path, *, with_tokenizer: bool) -> None:
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


def _has_template(directory: Path) -> bool:
    if any(exists(directory / name) for name in _TEMPLATES):
        return True
    config = directory / "tokenizer_config.json"
    return is_file(config) and bool(read_json_object(config).get("chat_template"))


def _copy_matching(base: Path, directory: Path, patterns: tuple[str, ...]) -> None:
    for name in names_in(base):
        wanted = any(fnmatch(name, each) for each in patterns) and is_file(base / name)
        if wanted and not exists(directory / name):
            copy_file(base / name, directory / name)
