"""``config.json`` and ``generation_config.json``: complete, true to the weights beside them, without stale entries."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import enum
import json
import types
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from pathlib import Path
from typing import TYPE_CHECKING, cast

from shardwise.addons.custom_code import custom_auto_map
from shardwise.addons.files import copy_file, write_json, write_text, written_locally
from shardwise.base.files import find_directory
from shardwise.comm import JsonValue
from shardwise.disk.names import is_file
from shardwise.errors import CheckpointNotFoundError, MisuseError, ShardwiseError
from shardwise.format.json_file import read_json_object
from shardwise.stateful_wrappers.model_parts import has_quantized_parameters
from shardwise.stateful_wrappers.wrapping import bare_model, original_class
from shardwise.upstream.hugging_face import CLASS_NAME, keeps_config, mixin_config, replace_config
from shardwise.upstream.transformers import FROM_MODEL_CONFIG, NAME_OR_PATH

if TYPE_CHECKING:
    import torch
    import torch.nn as nn
    from transformers import GenerationConfig, PreTrainedConfig

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"

CONFIG_V5 = "config.v5.json"

_QUANTIZATION = "quantization_config"
_TIE = "tie_word_embeddings"

#: Levels of nesting below which a configuration is taken for one without an end.
_DEEPEST = 20

#: Entries of a generation config that say where it came from and not how to generate.
_GENERATION_ORIGIN = frozenset({"transformers_version", FROM_MODEL_CONFIG})

#: Metadata files in which transformers looks for an ``auto_map``.
_AUTO_MAP_FILES = (
    CONFIG,
    CONFIG_V5,
    "tokenizer_config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
)


# --- what the reference page documents ------------------------------------------------------------------------------


def _config_exists(original_model_path: str, config_name: str) -> bool:
    """Whether the base model, a local directory or a hub id in the hub cache, has a file ``config_name``."""
    base = find_directory(original_model_path)
    return base is not None and is_file(base / config_name)


def _save_original_config_json(
    original_model_path: str, hf_metadata_dir: str, config_name: str, *, keep_quantization: bool = False
) -> None:
    """Copy the original pretrained ``config.json`` with ``quantization_config`` stripped.

    Readers of the 4.x generation of transformers get the file that they know. Without quantization in it, or where that
    is still true (``keep_quantization``), the file is copied byte for byte; else every other entry keeps its value and
    its place. Called on the rank that writes.

    Raises:
        CheckpointNotFoundError: The base model, a local directory or a hub id in the hub cache, has no such file.
        FormatError: The file is not a JSON object.
    """
    base = find_directory(original_model_path)
    if base is None or not is_file(base / config_name):
        raise CheckpointNotFoundError(
            f"the base model has no {config_name}",
            path=original_model_path if base is None else base / config_name,
            hint="Give a directory or a cached hub id as the base model, or leave v4_compatible off.",
        )
    entries = read_json_object(base / config_name)
    if not keep_quantization and _strip(entries):
        write_json(Path(hf_metadata_dir) / config_name, entries)
    else:
        copy_file(base / config_name, Path(hf_metadata_dir) / config_name)


def _maybe_strip_quantization_config(model_part: torch.nn.Module) -> None:
    """Remove ``quantization_config`` from the HF config when no parameters are quantized.

    A model that was dequantized while it was loaded still carries the entry, and a checkpoint with it would be read as
    quantized. The entry is removed **from the model's own config**, in sub-configs too, whether they are objects or
    dicts. Nothing changes where any parameter is quantized (`has_quantized_parameters`) or where there is no config.

    Args:
        model_part: The model, or the part of it on this rank; wrappers are looked through.
    """
    model = bare_model(model_part)
    config: object = getattr(model, "config", None)
    if config is None or has_quantized_parameters(model.modules()):
        return
    if isinstance(config, dict) and _QUANTIZATION in config and keeps_config(model):
        # diffusers' FrozenDict refuses deletion, and repeats its entries as attributes: it has to be rebuilt.
        kept = {key: value for key, value in config.items() if key != _QUANTIZATION}
        replace_config(model, type(config)(kept))
    else:
        _strip(config)


def _strip(config: object) -> bool:
    """Remove the entry from a config, an object or a dict, and from its sub-configs; whether anything was removed."""
    entries: Mapping[str, object]
    removed = False
    if isinstance(config, MutableMapping):
        removed = config.pop(_QUANTIZATION, _ABSENT) is not _ABSENT
        entries = config
    else:
        entries = getattr(config, "__dict__", {})
        if _QUANTIZATION in entries:
            delattr(config, _QUANTIZATION)
            removed = True
    below = [value for value in entries.values() if isinstance(value, MutableMapping) or is_config(value)]
    return any([removed, *(_strip(value) for value in below)])


_ABSENT = object()


# --- writing --------------------------------------------------------------------------------------------------------


def is_transformers_config(config: object) -> bool:
    """Whether ``config`` writes itself as transformers' configs do."""
    from transformers import PreTrainedConfig

    return isinstance(config, PreTrainedConfig)


def write_config(
    model: nn.Module, path: Path, dtype: str | None, *, keep_quantization: bool, v4_names: bool = False
) -> None:
    """Write the transformers config of a model, whole, as it should be read beside the written weights.

    Nothing is left to class defaults, which differ between releases: every entry is written. ``dtype`` (torch's name;
    ``None`` keeps what the config says) and ``architectures`` are what transformers itself would put there; the model's
    own config is left as it is. ``v4_names`` repeats the rotary settings under the names that transformers 4.x reads.
    """
    from transformers import PreTrainedModel

    cls = original_class(model)
    with naming_entries(model, model.config):
        exported: PreTrainedConfig = copy.deepcopy(model.config)
        if isinstance(model, PreTrainedModel) or not exported.architectures:
            exported.architectures = [cls.__name__]
        if dtype is not None:
            _set_dtype(exported, dtype)
        if not keep_quantization:
            _strip(exported)
        entries = json.loads(exported.to_json_string(use_diff=False))
    _drop_origin(entries)
    if v4_names:
        _add_v4_rope(entries)
    declared = custom_auto_map(model, model.config)
    if declared or entries.get("auto_map"):
        entries["auto_map"] = {**declared, **(entries.get("auto_map") or {})}
    write_json(path, entries)


def _set_dtype(config: PreTrainedConfig, dtype: str) -> None:
    """Set the dtype on a config and on those sub-configs that name one, as loading does (``_get_dtype``)."""
    config.dtype = dtype
    for name in getattr(config, "sub_configs", None) or {}:
        below = getattr(config, name, None)
        if is_transformers_config(below) and getattr(below, "dtype", None) is not None:
            _set_dtype(below, dtype)


def _drop_origin(entries: MutableMapping[str, JsonValue]) -> None:
    """Remove where the model was loaded from: a path of this machine, of no use elsewhere."""
    entries.pop(NAME_OR_PATH, None)
    for value in entries.values():
        if isinstance(value, dict):
            _drop_origin(value)


def _add_v4_rope(entries: dict[str, JsonValue]) -> None:
    """Repeat ``rope_parameters`` as 4.x spells it, in sub-configs too.

    Release 5 gathers in one entry what 4.x reads from ``rope_theta``, ``rope_scaling``, ``partial_rotary_factor`` and,
    where sliding layers rotate differently, ``rope_local_base_freq``. A 4.x reader ignores the new entry and silently
    uses the class's defaults: the model loads and is wrong.
    """
    for value in list(entries.values()):
        if isinstance(value, dict):
            _add_v4_rope(value)
    rope = entries.get("rope_parameters")
    if not isinstance(rope, dict):
        return
    full, sliding = rope.get("full_attention"), rope.get("sliding_attention")
    if isinstance(sliding, dict) and "rope_theta" in sliding:
        entries.setdefault("rope_local_base_freq", sliding["rope_theta"])
    settings = full if isinstance(full, dict) else rope
    for name in ("rope_theta", "partial_rotary_factor"):
        if name in settings:
            entries.setdefault(name, settings[name])
    if settings.get("rope_type", "default") != "default":
        scaling = {k: v for k, v in settings.items() if k not in ("rope_theta", "partial_rotary_factor")}
        entries.setdefault("rope_scaling", scaling)


def untie_configs(directory: Path) -> None:
    """Set ``tie_word_embeddings`` to false in a directory's ``config.json`` and ``config.v5.json``, sub-configs too."""
    for path in (directory / CONFIG, directory / CONFIG_V5):
        if is_file(path):
            write_json(path, untied(read_json_object(path)))


def untied(entries: Mapping[str, JsonValue]) -> dict[str, JsonValue]:
    """The entries of a configuration with ``tie_word_embeddings: false``, at the top and wherever else it may be.

    It is true by default in some classes, whose files do not mention it.
    """
    out = _changed(entries, lambda key, value: False if key == _TIE else value)
    for below in (out, out.get("text_config")):
        if isinstance(below, dict):
            below[_TIE] = False
    return out


def _changed(entries: Mapping[str, JsonValue], change: Callable[[str, JsonValue], JsonValue]) -> dict[str, JsonValue]:
    """The entries of a configuration with other values, of parts of the model too."""
    return {
        key: _changed(value, change) if isinstance(value, dict) else change(key, value)
        for key, value in entries.items()
    }


def with_dtype(entries: Mapping[str, JsonValue], dtype: str) -> dict[str, JsonValue]:
    """The entries of a configuration with another dtype wherever one is said, of parts of the model too."""
    names = ("dtype", "torch_dtype")
    return _changed(entries, lambda key, value: dtype if key in names and isinstance(value, str) else value)


def write_own_config(model: nn.Module, config: object, directory: Path, *, keep_quantization: bool) -> None:
    """Write ``config.json`` of a model that is not transformers', out of its wrappers.

    The model or its config writes it where it can (diffusers, ``save_pretrained``); otherwise what the config's
    ``to_dict()`` gives, a mapping's entries, or an object's public attributes (a namespace, a dataclass).
    """
    save = getattr(model, "save_config", None) or getattr(config, "save_pretrained", None)
    path = directory / CONFIG
    if callable(save):
        with _spared(model, config), written_locally(directory) as local:
            cast(Callable[[str], object], save)(str(local))
    else:
        to_dict: object = getattr(config, "to_dict", None)
        given: object = to_dict() if callable(to_dict) else config
        if not isinstance(given, Mapping):
            given = {name: value for name, value in getattr(given, "__dict__", {}).items() if not name.startswith("_")}
        write_json(path, json.loads(json.dumps(dict(given), default=_nested)))
    if not is_file(path):
        return
    entries = read_json_object(path)
    before = json.dumps(entries)
    if CLASS_NAME in entries:
        entries[CLASS_NAME] = original_class(model).__name__
    if not keep_quantization:
        _strip(entries)
    if json.dumps(entries) != before:
        write_json(path, entries)


def _nested(value: object) -> object:
    """A value for JSON in place of an object inside a config."""
    to_dict: object = getattr(value, "to_dict", None)
    if callable(to_dict):
        return to_dict()
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, Mapping):
        return dict(value)
    if type(value).__module__ == "torch":  # a dtype
        return str(value).removeprefix("torch.")
    if isinstance(value, types.SimpleNamespace) or dataclasses.is_dataclass(value):
        return dict(vars(value))
    raise TypeError(f"an entry is a {type(value).__name__}")


def write_hub_mixin_config(model: nn.Module, directory: Path) -> None:
    """Write the ``config.json`` of a model with huggingface_hub's ``PyTorchModelHubMixin``, as the mixin does.

    The mixin keeps the arguments that the model was built with, if JSON can express them.
    """
    config = mixin_config(model)
    if config is not None:
        with naming_entries(model, config):
            entries = dataclasses.asdict(config) if dataclasses.is_dataclass(config) else config  # type: ignore[arg-type]
            text = json.dumps(entries, sort_keys=True, indent=2)
        write_text(directory / CONFIG, text)


@contextlib.contextmanager
def _spared(model: nn.Module, config: object) -> Iterator[None]:
    """Lend a diffusers model a copy of its config: writing notes the running class in it, FSDP2's generated one too."""
    if not isinstance(config, dict) or not keeps_config(model):
        yield
        return
    replace_config(model, type(config)(config))
    try:
        yield
    finally:
        replace_config(model, config)


def write_generation_config(model: nn.Module, path: Path, base: Path | None) -> None:
    """Write the generation config; the base model's file where the model in memory has no settings of its own.

    A model built from its config, and not loaded, has a generation config that only repeats the config's token ids:
    written over the base model's, it would drop stop tokens and sampling settings. Nothing is written for a model that
    cannot generate.
    """
    can_generate = getattr(model, "can_generate", None)
    if callable(can_generate) and not can_generate():
        return
    generation: GenerationConfig | None = getattr(model, "generation_config", None)
    theirs = base / GENERATION_CONFIG if base is not None else None
    if theirs is not None and is_file(theirs) and (generation is None or _says_nothing(generation, model.config)):
        copy_file(theirs, path)
        return
    if generation is None or not callable(can_generate):
        return
    write_text(path, generation.to_json_string(use_diff=True, keys_to_pop=["compile_config"]))


def _says_nothing(generation: GenerationConfig, config: object) -> bool:
    """Whether a generation config holds only defaults and what it took from the model's config."""
    from transformers import GenerationConfig

    taken = GenerationConfig.from_model_config(config).to_diff_dict()
    own = {key: value for key, value in generation.to_diff_dict().items() if key not in _GENERATION_ORIGIN}
    return all(taken.get(key, _ABSENT) == value for key, value in own.items())


def localize_auto_maps(directory: Path) -> None:
    """Point the metadata's ``auto_map`` at the modules beside it: ``repo--module.Class`` becomes ``module.Class``.

    transformers fetches a prefixed reference from the hub even where the module was exported with the model.
    """
    for path in (directory / name for name in _AUTO_MAP_FILES):
        entries = read_json_object(path) if is_file(path) else {}
        auto_map = entries.get("auto_map")
        if not isinstance(auto_map, dict):
            continue
        local = {key: _localized(value, directory) for key, value in auto_map.items()}
        if local != auto_map:
            entries["auto_map"] = local
            write_json(path, entries)


def _localized(reference: JsonValue, directory: Path) -> JsonValue:
    if isinstance(reference, list):
        return [_localized(each, directory) for each in reference]
    if not isinstance(reference, str) or "--" not in reference:
        return reference
    target = reference.rpartition("--")[2]
    return target if is_file(directory / (target.partition(".")[0] + ".py")) else reference


# --- which entry cannot be written ----------------------------------------------------------------------------------


@contextlib.contextmanager
def naming_entries(model: nn.Module, config: object) -> Iterator[None]:
    """Turn an error in writing a configuration into a `MisuseError` that names the property or entry."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        if isinstance(error, ShardwiseError) and not isinstance(error, MisuseError):
            raise
        entry = _in_properties(config) or _in_value(_entries(config), "", 0)
        where = f"its entry {entry}" if entry else f"{type(error).__name__}: {error}"
        raise MisuseError(
            f"the config of {original_class(model).__name__} cannot be written as JSON: {where}",
            hint="Keep only numbers, strings, lists and dicts in model.config, and let its properties return them.",
        ) from error


def _in_properties(config: object) -> str:
    """The first property that raises when it is read, and its error; empty if none does."""
    for cls in type(config).__mro__:
        for name, member in vars(cls).items():
            if not isinstance(member, property) or name.startswith("__"):
                continue
            try:
                getattr(config, name)
            except NotImplementedError:
                continue  # an abstract one, which is never read
            except Exception as error:  # noqa: BLE001 - its error goes into the message
                return f"{name}, a property that raises {type(error).__name__}: {error}"
    return ""


def _entries(config: object) -> object:
    return config if isinstance(config, Mapping) else dict(getattr(config, "__dict__", {}))


def is_config(value: object) -> bool:
    """Whether a value is a configuration object with entries of its own."""
    return hasattr(value, "to_dict") and hasattr(value, "__dict__") and not isinstance(value, type)


def _in_value(value: object, path: str, depth: int) -> str:
    """Path and kind of the first entry that JSON cannot express; empty if all can be."""
    if depth > _DEEPEST:
        return f"{path}, which is nested without an end"
    if isinstance(value, Mapping):
        for key, below in value.items():
            where = f"{path}.{key}" if path else str(key)
            if not isinstance(key, (str, int, float, bool, type(None))):
                return f"{where}, whose key is a {type(key).__name__}"
            found = _in_value(below, where, depth + 1)
            if found:
                return found
        return ""
    if isinstance(value, (list, tuple)):
        return next(filter(None, (_in_value(v, f"{path}[{n}]", depth + 1) for n, v in enumerate(value))), "")
    if type(value).__module__ == "torch" and type(value).__name__ == "dtype":
        return ""  # its name is written
    if is_config(value):
        below = _in_properties(value)
        return f"{path}.{below}" if below else _in_value(_entries(value), path, depth + 1)
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return f"{path}, a {type(value).__name__}"
    return ""
