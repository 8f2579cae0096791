"""The commands that write: consolidate, convert, merge-adapter, prune, repair, push."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from shardwise.cli.exits import FINE, FOUND
from shardwise.cli.output import count, progress_bar, say, show, size, tell
from shardwise.cli.showing import no_root
from shardwise.errors import MisuseError

if TYPE_CHECKING:
    import argparse

    from shardwise.ops.consolidate import ConsolidateReport
    from shardwise.ops.convert import ConvertReport
    from shardwise.ops.merge import MergeReport


#: Options about a source that does not say it itself, as functions call them.
_OF_SOURCE = ("config", "prefix", "rope", "assume_complete", "master_weights", "verify_export")


def _given(options: argparse.Namespace, *names: str) -> dict[str, Any]:
    """Options that a function takes under their own names."""
    return {name: getattr(options, name) for name in names}


def consolidate(options: argparse.Namespace) -> int:
    """``shardwise consolidate``."""
    from shardwise.ops import consolidate as work

    chosen = _given(options, "max_file_bytes", "dtype", "base", "diffusers_compatible", *_OF_SOURCE)
    with progress_bar(options.quiet) as progress:
        report = work.consolidate(options.path, options.output, progress=progress, **chosen)
    return _tell_written(options, report, f"{count(report.tensors, 'tensor')} in {count(len(report.files), 'file')}")


def convert(options: argparse.Namespace) -> int:
    """``shardwise convert``."""
    from shardwise.ops import convert as work

    chosen = _given(options, "optimizer", "epoch", "step", *_OF_SOURCE)
    with progress_bar(options.quiet) as progress:
        report = work.convert(options.source, options.target, options.to, progress=progress, **chosen)
    optimizer = " and the optimizer's state" if report.optimizer else ""
    return _tell_written(options, report, count(report.tensors, "tensor") + optimizer)


def merge_adapter(options: argparse.Namespace) -> int:
    """``shardwise merge-adapter``."""
    from shardwise.ops import merge as work

    chosen = _given(options, "max_file_bytes", "verify_export")
    with progress_bar(options.quiet) as progress:
        report = work.merge_adapter(options.base, options.adapter, options.output, progress=progress, **chosen)
    return _tell_written(options, report, f"{count(report.tensors, 'tensor')}, {len(report.merged):,} of them merged")


def _tell_written(
    options: argparse.Namespace, report: ConsolidateReport | ConvertReport | MergeReport, what: str
) -> int:
    """Print what a command wrote, and the exit code."""
    for note in report.notes:
        tell(f"note  {note}")
    show(options, report, [f"wrote {report.path}: {what}, {size(report.nbytes)}"])
    return FINE


def prune(options: argparse.Namespace) -> int:
    """``shardwise prune``."""
    from shardwise.ops import prune as work

    asked = (options.keep_last, options.keep_every, options.keep_best)
    policy = None
    if any(each is not None for each in asked):
        policy = work.Retention(*asked, options.metric_mode, options.metric)
    report = work.prune_checkpoints(options.root, policy, delete=options.yes)
    lines = [f"{'deleted' if report.deleted else 'would delete'}  {name}" for name in report.names]
    lines.append(f"{len(report.kept)} kept in {report.root}" if report.names or report.kept else no_root(report.root))
    if report.names and not report.deleted:
        lines.append("Nothing was changed; --yes deletes them.")
    show(options, report, lines)
    return FINE


def repair(options: argparse.Namespace) -> int:
    """``shardwise repair``."""
    from shardwise.ops import repair as work

    report = work.repair(options.root, apply=options.yes)
    lines = [f"{'removed' if report.done else 'would remove'}  {name}" for name in report.leftovers]
    for each in report.pointers:
        old = "nothing" if each.old is None else each.old
        lines.append(f"{'set' if report.done else 'would set'}  {each.name}: {old} -> {each.new}")
    found = bool(lines)
    show(options, report, lines)
    if not options.json:
        for sentence in report.left:
            say(f"left     {sentence}")
        if found and not report.done and not options.quiet:
            say("Nothing was changed; --yes does it.")
        elif not found and not report.left and not options.quiet:
            say(f"{report.root} is in order" if report.checkpoints else no_root(report.root))
    return FOUND if report.left or (found and not report.done) else FINE


def push(options: argparse.Namespace) -> int:
    """``shardwise push``."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled

    from shardwise.ops import push as work

    chosen = _given(options, "revision", "private", "message", "allow_unverified")
    try:
        with progress_bar(options.quiet) as progress:
            report = work.push(options.path, options.repo, progress=progress, **chosen)
    except (HfHubHTTPError, HFValidationError, LocalTokenNotFoundError) as error:
        raise MisuseError(
            f"the Hub refused: {error}", hint="Check the repository's name and `hf auth login`."
        ) from error
    except Exception as error:
        # No network, no answer: an error of whichever HTTP client the Hub's library has, the first base of its own.
        if not isinstance(error, (OfflineModeIsEnabled, HfHubHTTPError.__bases__[0])):
            raise
        raise MisuseError(
            f"the Hub cannot be reached: {error}",
            hint="Check the network, and push again: nothing is shown until then.",
        ) from error
    for name in report.left:
        tell(f"note  {name} is a checkpoint and was not uploaded")
    files = count(len(report.files), "file")
    show(options, report, [f"uploaded {files}, {size(report.nbytes)}, of {report.path} to {report.repo} {report.url}"])
    return FINE
