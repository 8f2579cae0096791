"""The settings, checked when they are set.

`CheckpointingConfig` is plain data: it imports neither torch nor transformers until it has to, and a mistake in it is a
`ConfigError` before the first step rather than a surprise at the first save.
"""

from __future__ import annotations

import difflib
import enum
import functools
import logging
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import Field, dataclass, fields
from pathlib import Path
from typing import Self, TypeVar

from shardwise.errors import ConfigError, UnknownSettingError

__all__ = ["SaveConsolidatedMode", "SerializationFormat", "Settings"]

# By the name under which users know the settings.
logger = logging.getLogger("shardwise.config")

_CHOICES = {
    "best_metric_mode": ("min", "max"),
    "share_replica_reads": ("auto", "always", "never"),
    "replicas": ("compare", "first"),
}
# A URL keeps both slashes in a string; pathlib folds them into one. Two letters at least: "C:/" is a drive.
_REMOTE = re.compile(r"[A-Za-z][A-Za-z0-9+.\-]+:/")
#: Settings in which "~/" is the home directory: no shell has seen a YAML file, and a directory called "~" is no place.
_PLACES = frozenset(
    {"checkpoint_dir", "model_cache_dir", "model_repo_id", "original_model_root_dir", "staging_dir", "trace"}
)
_Class = TypeVar("_Class", bound=type)


class SerializationFormat(enum.StrEnum):
    """How tensors are written. Members compare equal to their text.

    Attributes:
        SAFETENSORS: safetensors files: shards, or the Hugging Face export.
        TORCH_SAVE: DCP's ``.distcp`` files.
    """

    SAFETENSORS = "safetensors"
    TORCH_SAVE = "torch_save"


class SaveConsolidatedMode(enum.Enum):
    """When a save writes the consolidated Hugging Face export.

    Attributes:
        FALSE: Never; sharded safetensors only.
        FINAL: With the save that is marked as the last one.
        EVERY: With every save.
    """

    FALSE = "false"
    FINAL = "final"
    EVERY = "every"


# Quoted booleans reach us as text: YAML's own spellings mean what they mean unquoted.
_MODE_ALIASES = {mode.value: mode for mode in SaveConsolidatedMode}
_MODE_ALIASES |= dict.fromkeys(("true", "yes", "on"), SaveConsolidatedMode.EVERY)
_MODE_ALIASES |= dict.fromkeys(("no", "off"), SaveConsolidatedMode.FALSE)


def _is_geq_torch_2_9() -> bool:
    """Say whether the torch that would be used is 2.9.0 or newer (imports torch)."""
    import torch
    from packaging.version import Version

    return Version(str(torch.__version__)) >= Version("2.9.0")


def _normalize_save_consolidated(value: bool | str | SaveConsolidatedMode) -> SaveConsolidatedMode:
    """Turn a mode, its name in any case, or a legacy bool (``True`` is ``every``) into a `SaveConsolidatedMode`.

    Raises:
        ConfigError: ``value`` is none of these.
    """
    if isinstance(value, SaveConsolidatedMode):
        return value
    if isinstance(value, bool):
        return SaveConsolidatedMode.EVERY if value else SaveConsolidatedMode.FALSE
    if isinstance(value, str) and (mode := _MODE_ALIASES.get(value.strip().lower())) is not None:
        return mode
    raise ConfigError(
        f"save_consolidated is {value!r}", hint="Use 'false' (shards only), 'final' (with the last save) or 'every'."
    )


def _unknown_key(key: object, known: Iterable[str]) -> UnknownSettingError:
    """The error for a key that no setting has; it names the nearest that one has."""
    if key == "restore_from":
        return UnknownSettingError(
            "'restore_from' is not a setting of the engine",
            hint="Take it out of the block and pass it to Checkpointer.restore(restore_from=...).",
        )
    near = difflib.get_close_matches(str(key).lower(), list(known), n=1, cutoff=0.0)[0]
    return UnknownSettingError(f"Unknown key {key!r} in the checkpoint block", hint=f"Did you mean {near!r}?")


def _names_unknown_keys(cls: _Class) -> _Class:
    """Let a dataclass answer a keyword that it does not have with `_unknown_key`: blocks are passed as ``**block``."""
    plain: Callable[..., None] = vars(cls)["__init__"]
    known: Mapping[str, object] = vars(cls)["__dataclass_fields__"]

    @functools.wraps(plain)
    def init(self: object, *args: object, **kwargs: object) -> None:
        for key in kwargs:
            if key not in known:
                raise _unknown_key(key, known)
        plain(self, *args, **kwargs)

    type.__setattr__(cls, "__init__", init)
    return cls


@_names_unknown_keys
@dataclass
class Settings:
    """Everything that can be set about checkpointing; every field has a default.

    Fields up to ``best_metric_key`` are those of the reference page, those up to ``max_recent_checkpoints`` belong to
    the engine it describes, the rest are ours.

    Attributes:
        enabled: Whether the training loop saves at all.
        checkpoint_dir: Root that holds the checkpoints and the pointers to them: a path, or a URL (``scheme://...``).
        model_save_format: ``safetensors``, or ``torch_save`` for DCP's ``.distcp`` files, which come without an export:
            building a checkpointer with ``save_consolidated="every"`` as well is an error. A `SerializationFormat`,
            which is text too, after construction.
        model_cache_dir: Where base models are cached; the Hugging Face hub's cache when not given.
        model_repo_id: Hub name or local directory of the base model.
        save_consolidated: When to write the Hugging Face export; a `SaveConsolidatedMode` after construction.
        is_peft: Whether an adapter is trained: it is saved, with what is trained beside it, and not the base model.
        model_state_dict_keys: Names of the base model's parameters as they are on the hub, where known; a pipeline
            stage may list its own. An export that lacks one of them is refused before a tensor is written
            (``verify_export``), also where the base model itself is not at hand.
        is_async: Write in the background. Needs torch 2.9 or newer; with an older one it becomes ``False``, with a
            warning that says so.
        dequantize_base_checkpoint: Whether quantized base weights become ordinary floating point on loading; ``None``
            decides by what the base model's configuration says.
        original_model_root_dir: Root directory in which the base model lies, where that is not the cache.
        skip_task_head_prefixes_for_base_model: Parameters with these prefixes keep their fresh initialisation.
        single_rank_consolidation: Let one rank merge the export, for file systems without random writes.
        staging_dir: Local directory below which a merging rank builds files before it copies them into place. Several
            runs may name the same one.
        v4_compatible: Export configurations (and expert adapters) that transformers 4 understands.
        diffusers_compatible: Name the weight index as diffusers expects it. With ``is_peft`` the adapter is saved as
            ``pytorch_lora_weights.safetensors``, which ``load_lora_weights`` of a pipeline opens.
        best_metric_key: Key in ``metrics`` that decides which checkpoint is the best.
        wait_for_staging: Return from an asynchronous save only when everything is staged. Without it, copies from an
            accelerator may still be queued then; later work of the loop runs behind them.
        cpu_offload: Move states to the CPU as they are captured, into memory that the checkpointer keeps for that, and
            write them from there: a synchronous save then reads an accelerator once, at its beginning. Asynchronous
            saves do so anyway.
        allow_legacy_pickle_restore: Permit unrestricted unpickling of legacy states, which can run code from the file.
        legacy_paramwrapper_layout: Read and write adapters on expert parameters in the layout of older releases.
        consolidation_timeout_minutes: How long the other ranks wait for a merging rank, in minutes, whatever
            ``collective_timeout_seconds`` says.
        max_recent_checkpoints: How many of the newest complete checkpoints to keep; ``None`` keeps all.
        random_writes: False where the file system cannot take random writes into shared files: the merging path is
            used. Unlike with ``single_rank_consolidation``, every rank may still merge files.
        max_file_bytes: Largest exported file, in bytes, where there is no base model whose split is kept: uploads and
            tools dislike larger ones.
        io_threads: Threads per rank that read and write; ``None`` derives it from the cores. Shared nodes and network
            file systems may want fewer or more.
        collective_timeout_seconds: Within how long a rank raises that a peer is lost: a hung peer must end as an error
            that names it, and only the user knows how slow an honest one may be. A quarter, at most 12 s, of it is kept
            for finding out which one it is.
        verify_export: Compare names, shapes, dtypes and ties of an export with the base model, and let the class that
            its config.json describes load it on the meta device, before a tensor is written; refuse to export a model
            that has an adapter of peft's in it. A wrong export is otherwise found weeks later, by someone else's tool.
            False writes it all the same.
        pass_through_unloaded: Carry over tensors that the base model ships and the model class does not load, such as
            multi-token-prediction heads, which the exported configuration still promises.
        keep_every_k_steps: Also keep checkpoints whose step is a multiple of this, so that a long run stays
            inspectable while ``max_recent_checkpoints`` is small.
        keep_best: Also keep this many checkpoints with the best ``best_metric_key``. A save without that metric warns,
            and nothing is deleted as long as no checkpoint has it.
        best_metric_mode: ``min`` where a lower metric is better, ``max`` where a higher one is; a loss and an accuracy
            differ in this.
        skip_save_while_busy: Skip a save that is due while the last one is still written in the background, instead of
            waiting for it: some loops rather lose a checkpoint than time. The final save, and one after the ranks were
            asked to stop, is never skipped.
        save_rng: Save the random number generators' states, without which a resumed run repeats or changes its draws.
        share_replica_reads: Whether ranks that load the same bytes (replicas under DDP or HSDP, norms that tensor
            parallelism leaves whole) read them once and pass them on: ``always``, ``never``, or ``auto``, which does
            so where the files are on a network or FUSE file system. There, many replicas that read the same are what a
            restart waits for; on a local disk the page cache is faster than passing on. Conversions that have to be
            computed are always read by each rank.
        replicas: What is saved of a tensor that several ranks hold whole, or as the same shard: ``compare`` compares
            their bytes, and an error that names tensor and ranks is raised before anything is published where they
            differ, since saving one would lose the others; ``first`` saves the value of the lowest rank and compares
            nothing, for those who mean that. Of buffers and extra state it is always the lowest rank's, as in
            DistributedDataParallel's own broadcast. Comparing reads each replica's bytes once more.
        per_rank_state: Patterns of names (``*.experts.*``, as for file names) of tensors of which each rank has a value
            of its own: experts kept by hand, statistics of a rank's own batches. They and their optimizer state are
            also saved for each rank, and restored to it on the same number of ranks; other tools and other numbers
            of ranks get the lowest rank's. A pattern that matches nothing is an error.
        allow_missing_base: Save without a base model's split, dtypes, configuration and comparison where the one that
            is named (``model_repo_id``, ``original_model_root_dir``) is not found, for a model that trains from
            scratch under a base's name. Otherwise that is an error, since a mistyped name looks just the same.
        export_merged: Beside an adapter (``is_peft``) also write ``consolidated/``, the base model with the active
            adapters merged into it, whenever ``save_consolidated`` asks for an export: what peft's
            ``merge_and_unload()`` gives on the CPU from the run's tensors in the run's dtypes, rounded to the base
            model's dtypes and saved. The adapter alone is what a run resumes from. Each module is put together on one
            rank, so memory is bounded by the largest adapted module.
        log_summary: Log one line on rank 0 after each save and load (step, bytes, seconds, rate, place, what was
            removed), and show a bar of long ones on a terminal. Where neither the logger ``shardwise`` nor the root
            logger has a handler when a checkpointer is built, messages from INFO on go to standard error.
        trace: Directory for traces of each save's and load's phases, a file for each rank, which Perfetto and Chrome
            open; the environment variable ``SHARDWISE_TRACE`` where it is not given. docs/what-you-see.md says what is
            in them.
    """

    enabled: bool = True
    checkpoint_dir: str | Path = "checkpoints/"
    model_save_format: str = "safetensors"
    model_cache_dir: str | Path | None = None
    model_repo_id: str | None = None
    save_consolidated: bool | str | SaveConsolidatedMode = "final"
    is_peft: bool = False
    model_state_dict_keys: list[str] | None = None
    is_async: bool = False
    dequantize_base_checkpoint: bool | None = None
    original_model_root_dir: str | None = None
    skip_task_head_prefixes_for_base_model: list[str] | None = None
    single_rank_consolidation: bool = False
    staging_dir: str | None = None
    v4_compatible: bool = False
    diffusers_compatible: bool = False
    best_metric_key: str = "default"
    wait_for_staging: bool = False
    cpu_offload: bool = False
    allow_legacy_pickle_restore: bool = False
    legacy_paramwrapper_layout: bool = False
    consolidation_timeout_minutes: int = 30
    max_recent_checkpoints: int | None = None
    random_writes: bool = True
    max_file_bytes: int = 5_000_000_000
    io_threads: int | None = None
    collective_timeout_seconds: float = 1800
    verify_export: bool = True
    pass_through_unloaded: bool = True
    keep_every_k_steps: int | None = None
    keep_best: int | None = None
    best_metric_mode: str = "min"
    skip_save_while_busy: bool = False
    save_rng: bool = True
    share_replica_reads: str = "auto"
    replicas: str = "compare"
    per_rank_state: list[str] | None = None
    allow_missing_base: bool = False
    export_merged: bool = False
    log_summary: bool = True
    trace: str | Path | None = None

    def __post_init__(self) -> None:
        """Resolve the cache directory, coerce format and mode, and reject what cannot work.

        Raises:
            ConfigError: A value is out of range or of the wrong kind, or two settings contradict each other.
        """
        if self.model_cache_dir is None:
            from huggingface_hub.constants import HF_HUB_CACHE

            self.model_cache_dir = HF_HUB_CACHE
        formats = tuple(member.value for member in SerializationFormat)
        self.model_save_format = SerializationFormat(_choice("model_save_format", self.model_save_format, formats))
        for key, choices in _CHOICES.items():
            setattr(self, key, _choice(key, getattr(self, key), choices))
        self.save_consolidated = _normalize_save_consolidated(self.save_consolidated)
        for field in fields(self):
            setattr(self, field.name, _checked(field, getattr(self, field.name)))
        self._check_merging()
        self._apply_peft_constraints()
        self._check_values()
        self._check_remote()
        if self.is_async and not _is_geq_torch_2_9():
            self.is_async = False
            logger.warning("is_async needs torch 2.9 or newer: saves are synchronous (is_async becomes False).")

    def _apply_peft_constraints(self) -> None:
        if self.is_peft and self.model_save_format == "torch_save":
            self.model_save_format = SerializationFormat.SAFETENSORS
            self.save_consolidated = SaveConsolidatedMode.FINAL
            logger.warning(
                "Adapters are saved as safetensors only: model_save_format 'torch_save' becomes 'safetensors' "
                "and save_consolidated becomes 'final'."
            )

    def _check_merging(self) -> None:
        if not self.export_merged:
            return
        reason = ""
        if not self.is_peft:
            reason = "is_peft is false: a model without an adapter is exported as it is"
        elif self.model_save_format == "torch_save":
            reason = "model_save_format 'torch_save' writes no Hugging Face export"
        elif self.consolidated_mode is SaveConsolidatedMode.FALSE:
            reason = "save_consolidated is 'false', and the merged export is written when an export is"
        if reason:
            raise ConfigError(
                f"export_merged has no effect: {reason}",
                hint="Leave export_merged out, or set is_peft to true, model_save_format to 'safetensors' and "
                "save_consolidated to 'final' or 'every'.",
            )

    def _check_values(self) -> None:
        if str(self.checkpoint_dir) == "":
            raise ConfigError("checkpoint_dir is empty", hint="Name the directory that is to hold the checkpoints.")
        for key in ("max_recent_checkpoints", "io_threads", "keep_every_k_steps", "keep_best"):
            value = getattr(self, key)
            if value is not None and (type(value) is not int or value < 1):
                raise ConfigError(f"{key} is {value!r}", hint="Use a whole number of at least 1, or leave it out.")
            if value is not None and key.startswith("keep_") and self.max_recent_checkpoints is None:
                hint = f"Set max_recent_checkpoints too, or leave {key} out."
                raise ConfigError(f"{key} has no effect while every checkpoint is kept", hint=hint)
        if type(self.max_file_bytes) is not int or self.max_file_bytes < 1:
            raise ConfigError(f"max_file_bytes is {self.max_file_bytes!r}", hint="Use a positive number of bytes.")
        for key in ("consolidation_timeout_minutes", "collective_timeout_seconds"):
            value = getattr(self, key)
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not math.isfinite(value) or value <= 0:
                raise ConfigError(f"{key} is {value!r}", hint="Use a number greater than 0.")
        patterns = self.per_rank_state
        if patterns is not None and not (patterns and all(patterns)):
            raise ConfigError(f"per_rank_state is {patterns!r}", hint="List patterns of names, or leave it out.")
        if patterns is not None and self.is_peft:
            hint = "Leave per_rank_state out, or set is_peft to false."
            raise ConfigError("per_rank_state has no effect where only an adapter is saved", hint=hint)

    def _check_remote(self) -> None:
        if not self.is_remote:
            return
        if self.model_save_format == "safetensors" and self.consolidated_mode is not SaveConsolidatedMode.FALSE:
            raise ConfigError(
                "A consolidated export cannot be written to a remote checkpoint directory",
                path=self.checkpoint_dir,
                hint="Set save_consolidated to 'false' and run `shardwise consolidate` later, or set checkpoint_dir to "
                "a local or mounted directory.",
            )
        if self.max_recent_checkpoints is not None:
            raise ConfigError(
                "max_recent_checkpoints cannot be applied to a remote checkpoint directory",
                path=self.checkpoint_dir,
                hint="Leave max_recent_checkpoints out and set a lifecycle rule on the bucket instead, or set "
                "checkpoint_dir to a local or mounted directory.",
            )

    @property
    def is_remote(self) -> bool:
        """Whether ``checkpoint_dir`` is a URL (``scheme://...``) and not a path."""
        text = str(self.checkpoint_dir)
        found = _REMOTE.match(text)
        return found is not None and (isinstance(self.checkpoint_dir, Path) or text.startswith("//", found.end() - 1))

    @property
    def consolidated_mode(self) -> SaveConsolidatedMode:
        """``save_consolidated`` with its exact type."""
        return _normalize_save_consolidated(self.save_consolidated)

    def exports(self, *, is_final_checkpoint: bool) -> bool:
        """Say whether a save writes ``consolidated/``; ``torch_save`` never does, and adapters do if merged."""
        if self.model_save_format != "safetensors" or (self.is_peft and not self.export_merged):
            return False
        mode = self.consolidated_mode
        return mode is SaveConsolidatedMode.EVERY or (mode is SaveConsolidatedMode.FINAL and is_final_checkpoint)

    @classmethod
    def from_dict(cls, block: Mapping[str, object]) -> Self:
        """Build a configuration from a ``checkpoint:`` block, or from a document that contains one.

        Numbers may be written as text (YAML reads ``1e9`` as text). Keys that are absent keep their default.

        Raises:
            ConfigError: A key is unknown (the nearest known one is named), or a value has the wrong type or range.
        """
        if not isinstance(block, Mapping):
            raise ConfigError(
                f"The checkpoint block is a {type(block).__name__}", hint="Write it as `key: value` lines."
            )
        if "checkpoint" in block:
            inner = block["checkpoint"]
            return cls.from_dict({} if inner is None else inner)  # type: ignore[arg-type]
        kinds = {field.name: str(field.type) for field in fields(cls)}
        values: dict[str, object] = {}
        for key, value in block.items():
            if key not in kinds:
                raise _unknown_key(key, kinds)
            values[key] = _number_in_text(key, kinds[key], value)
        return cls(**values)  # type: ignore[arg-type]

    @classmethod
    def from_yaml(cls, source: str | Path) -> Self:
        """Build a configuration from a YAML file, or from YAML text.

        A `Path`, and a one-line string that ends in ``.yaml`` or ``.yml``, is a file; any other string is text.

        Raises:
            ConfigError: The file cannot be read, is not YAML, or as in `from_dict`.

        Examples:
            >>> config = CheckpointingConfig.from_yaml("checkpoint: {checkpoint_dir: runs/one, is_async: true}")
            >>> config.checkpoint_dir, config.is_async
            ('runs/one', True)
        """
        import yaml

        path = None
        if isinstance(source, Path) or ("\n" not in source and source.strip().endswith((".yaml", ".yml"))):
            path = Path(source)
            try:
                source = path.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                reason = getattr(error, "strerror", None) or str(error)
                raise ConfigError(
                    f"The configuration cannot be read: {reason}", path=path, hint="Check the path and the file."
                ) from error
        try:
            document = yaml.safe_load(source)
        except yaml.YAMLError as error:
            raise ConfigError(f"This is not YAML: {error}", path=path, hint="Correct the file.") from error
        try:
            return cls.from_dict(document)
        except ConfigError as error:
            error.path = error.path or (None if path is None else str(path))
            raise


def _choice(key: str, value: object, allowed: tuple[str, ...]) -> str:
    text = value.strip().lower() if isinstance(value, str) else None
    if text in allowed:
        return text
    label = "Unsupported model save format" if key == "model_save_format" else f"Unsupported {key}"
    raise ConfigError(f"{label}: {value!r}", hint=f"Use {' or '.join(repr(choice) for choice in allowed)}.")


# A value of the wrong type must not pass because it happens to be truthy or iterable: ``is_async="false"`` would save
# in the background, and a prefix given as text would be taken as a list of letters.


def _checked(field: Field[object], value: object) -> object:
    """The value, if it is of its field's kind; a path that is to be text becomes text, any list of texts a list.

    ``~/`` is the home directory where a setting names a place. Numbers and modes are checked elsewhere. A value of
    another kind is a `ConfigError`.
    """
    kind = str(field.type)
    if value is None and kind.endswith("| None"):
        return None
    if kind.startswith("list[str]"):
        if isinstance(value, Iterable) and not isinstance(value, str | bytes | Mapping):
            texts = list(value)
            if all(isinstance(text, str) for text in texts):
                return texts
        raise _wrong_kind(field.name, value, "a list of texts")
    if kind.startswith("bool |") and "str" in kind:
        return value
    if kind.startswith("bool"):
        if not isinstance(value, bool):
            raise _wrong_kind(field.name, value, "true or false")
        return value
    if kind.startswith("str"):
        if not isinstance(value, str | os.PathLike):
            raise _wrong_kind(field.name, value, "text")
        path = value if "Path" in kind else os.fspath(value)
        if "\0" in str(path):
            raise _wrong_kind(field.name, value, "text without a zero byte")
        if field.name in _PLACES and str(path).startswith("~/"):
            return path.expanduser() if isinstance(path, Path) else os.path.expanduser(path)
        return path
    return value


def _wrong_kind(key: str, value: object, wanted: str) -> ConfigError:
    """The error for a value of another kind than its setting takes."""
    return ConfigError(f"{key} is {value!r}, a {type(value).__name__}", hint=f"Write {wanted}.")


def _number_in_text(key: str, kind: str, value: object) -> object:
    """A number that YAML may have read as text (``1e9``), by the annotation of its field; `ConfigError` for others."""
    if value is None and kind.endswith("| None"):
        return None
    if kind.startswith("float"):
        return _float(key, value)
    return _int(key, value) if kind.startswith("int") else value


def _float(key: str, value: object) -> float:
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            raise _wrong_kind(key, value, "a number") from None
    if isinstance(value, int | float) and not isinstance(value, bool):
        return value
    raise _wrong_kind(key, value, "a number")


def _int(key: str, value: object) -> int:
    if isinstance(value, str):
        # Underscores group digits in YAML 1.1 and in Python alike; int() keeps what float() would round.
        try:
            return int(value)
        except ValueError:
            pass
    number = _float(key, value)
    if isinstance(number, int):
        return number
    if not number.is_integer():
        raise _wrong_kind(key, value, "a whole number")
    return int(number)
