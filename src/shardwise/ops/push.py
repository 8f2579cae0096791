"""Uploads a model to the Hugging Face Hub, in one commit, after it was verified."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from shardwise.disk.names import file_size, files_under, is_directory, is_file
from shardwise.errors import IntegrityError, MisuseError, UnverifiableError
from shardwise.format.manifest import MANIFEST_NAME
from shardwise.lifecycle.names import foreign_numbers, parse_checkpoint_name
from shardwise.ops.targets import find_targets
from shardwise.ops.verify import TORCH_SUFFIXES, Damage, Progress, VerifyReport, verify
from shardwise.sources.directory_contents import holds_model

if TYPE_CHECKING:
    from huggingface_hub import HfApi

__all__ = ["PushReport", "push"]

_ADAPTER = "adapter_model.safetensors"


@dataclass(frozen=True, slots=True)
class PushReport:
    """What was uploaded.

    Attributes:
        path: The directory.
        repo: The repository.
        files: Its files, relative to the directory.
        nbytes: Bytes of these.
        url: Where the commit is, as the Hub says it.
        left: Directories of checkpoints in it (``checkpoint-500``), which were not uploaded.
    """

    path: Path
    repo: str
    files: tuple[str, ...]
    nbytes: int
    url: str
    left: tuple[str, ...] = ()


def push(
    path: str | os.PathLike[str],
    repo: str,
    *,
    revision: str | None = None,
    private: bool | None = None,
    message: str | None = None,
    allow_unverified: bool = False,
    progress: Progress | None = None,
    api: HfApi | None = None,
) -> PushReport:
    """Upload the Hugging Face model of a checkpoint: its export, its adapter, or a model's directory.

    Every byte is verified first. The Hub shows all files or none: they are one commit. What an interrupted upload had
    sent is not sent again where the Hub stores by content (hf_xet).

    Args:
        path: A checkpoint, its ``model``, a root (its newest checkpoint), or a model's directory.
        repo: ``organisation/name``; made where it does not exist.
        revision: The branch; the default one if not given.
        private: Whether a new repository is private; by default as the account is set.
        message: Of the commit.
        allow_unverified: Upload also what has no manifest, of which nobody can say whether it is whole.
        progress: Called while the files are verified.
        api: Instead of `huggingface_hub.HfApi`, for another endpoint or account.

    Raises:
        IntegrityError: It is damaged.
        UnverifiableError: It has no manifest.
        MisuseError: There is no model in its final form.
        CheckpointNotFoundError, IncompleteCheckpointError, StorageError: As `verify`.
        huggingface_hub.errors.HfHubHTTPError: The Hub refused.
    """
    directory = _model_of(path)
    report = verify(directory, progress=progress)
    _refuse_damaged(report, [damage for damage in report.damages if _checkpoint_of(Path(damage.file)) is None])
    if not report.verifiable and not allow_unverified:
        raise UnverifiableError(
            "the model has no manifest, so nobody can say whether it is whole; it was not uploaded",
            path=directory,
            hint="Pass --allow-unverified (allow_unverified=True) if you know that it is.",
        )
    every = {place.relative_to(directory): place for place in files_under(directory)}
    places = {relative.as_posix(): place for relative, place in every.items() if _belongs(relative)}
    left = dict.fromkeys(name for relative in every if (name := _checkpoint_of(relative)) is not None)
    if api is None:
        from huggingface_hub import HfApi

        api = HfApi()
    api.create_repo(repo, private=private, exist_ok=True)
    # Patterns are names here: a name with a bracket in it has to stand for itself.
    allowed = [name.replace("[", "[[]").replace("*", "[*]").replace("?", "[?]") for name in places]
    commit = api.upload_folder(
        repo_id=repo,
        folder_path=directory,
        revision=revision,
        commit_message=message or f"Upload {directory.name}",
        allow_patterns=allowed,
    )
    nbytes = sum(file_size(place) for place in places.values())
    return PushReport(directory, repo, tuple(places), nbytes, str(getattr(commit, "commit_url", "")), tuple(left))


def _model_of(path: str | os.PathLike[str]) -> Path:
    """The directory of a model in its final form."""
    [target, *others] = find_targets(path)
    named = next((each for each in (target, *others) if each.directory.name == "model"), target)
    place = named.directory / named.under
    for candidate in (place / "model" / "consolidated", place / "consolidated", place / "model", place):
        final = is_file(candidate / _ADAPTER) or (candidate.name != "model" and holds_model(candidate))
        own = candidate != place or not is_directory(place / "model")
        if final and own and not is_file(candidate / ".metadata") and not _in_pieces(candidate):
            return candidate
    report = verify(place, digests=False)
    _refuse_damaged(report, report.damages)  # its model may be what is lost
    raise MisuseError(
        "there is no model here in the form that others open",
        path=place,
        hint="Make its export with `shardwise consolidate`, or name a model's directory.",
    )


def _refuse_damaged(report: VerifyReport, damages: Sequence[Damage]) -> None:
    if damages:
        raise IntegrityError(
            f"the model is damaged and was not uploaded: {damages[0].describe()}",
            path=report.path,
            hint="`shardwise verify` lists everything; restore the file from a copy.",
        )


def _in_pieces(directory: Path) -> bool:
    """Whether its files are each rank's, which others open as a whole model only when they are put together."""
    names = [place.name for place in files_under(directory)]
    if any(name.startswith("shard-") for name in names):
        return True
    if not any(PurePosixPath(name).suffix in TORCH_SUFFIXES for name in names):
        return False
    from shardwise.sources.others.recognise import recognise  # imports torch

    return recognise(directory) is not None


def _belongs(relative: Path) -> bool:
    hidden = any(part.startswith(".") for part in relative.parts)
    return relative.name != MANIFEST_NAME and not hidden and _checkpoint_of(relative) is None


def _checkpoint_of(relative: Path) -> str | None:
    """The directory of a checkpoint that a file is in: training loops put these beside the model that they end with."""
    top, *below = relative.parts
    return top if below and (parse_checkpoint_name(top) or foreign_numbers(top)[1] is not None) else None
