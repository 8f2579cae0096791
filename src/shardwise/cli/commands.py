"""What each command does: it calls the work in `shardwise.ops`, prints the report, and returns an exit code."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from shardwise.cli.output import (
    FINE,
    FOUND,
    UNVERIFIABLE,
    age,
    clear_screen,
    code_of,
    columns,
    count,
    flush,
    gravest,
    print_json,
    progress_bar,
    record,
    say,
    show,
    size,
    tell,
    tell_error,
)
from shardwise.errors import MisuseError, ShardwiseError

if TYPE_CHECKING:
    import argparse

    from shardwise.ops.consolidate import ConsolidateReport
    from shardwise.ops.convert import ConvertReport
    from shardwise.ops.diff import DiffReport, LayerDifference
    from shardwise.ops.inspect import CheckpointDescription
    from shardwise.ops.listing import ListedCheckpoint
    from shardwise.ops.merge import MergeReport
    from shardwise.ops.verify import VerifyReport

_Report = TypeVar("_Report")
#: Options about a source that does not say it itself, as functions call them.
_OF_SOURCE = ("config", "prefix", "rope", "assume_complete", "master_weights", "verify_export")
#: More tensors that differ are shown by layer.
_MOST_LINES = 50
_STATE_COLOURS = {
    "damaged": "red",
    "being written": "yellow",
    "claimed": "yellow",
    "interrupted": "grey",
    "being deleted": "grey",
}


def _run(options: argparse.Namespace, work: Callable[..., _Report], *places: Path, names: Sequence[str]) -> _Report:
    """What ``work`` returns, with a progress bar and the options that it takes under their own names."""
    with progress_bar(options.quiet) as progress:
        return work(*places, progress=progress, **{name: getattr(options, name) for name in names})


def _each(paths: list[Path], json: bool, one: Callable[[Path], tuple[int, object]]) -> int:
    """Do ``one``, which gives exit code and result, for each path; a path that fails does not keep the others."""
    found: list[tuple[int, object]] = []
    for path in paths:
        try:
            found.append(one(path))
        except ShardwiseError as error:
            if len(paths) == 1:
                raise
            tell_error(error, f"{path}: ")
            found.append((code_of(error), {"requested": str(path), "error": error.to_record()}))
    if json:
        print_json(found[0][1] if len(paths) == 1 else [result for _, result in found])
    return gravest(code for code, _ in found)


def ls(options: argparse.Namespace) -> int:
    """``shardwise ls``."""
    if options.watch is None:
        return _each(options.root, options.json, lambda root: _list(root, options))
    if options.json or not options.watch > 0:
        raise MisuseError("--watch takes a number of seconds above 0, and no --json", hint="Leave one of them out.")
    while True:
        clear_screen()
        _each(options.root, False, lambda root: _list(root, options))
        flush()
        time.sleep(options.watch)


def _list(root: Path, options: argparse.Namespace) -> tuple[int, object]:
    from shardwise.ops.listing import list_checkpoints

    found = list_checkpoints(root)
    code = FOUND if any(each.state == "damaged" for each in found) else FINE
    if options.json:
        return code, [record(each) for each in found]
    if len(options.root) > 1:
        say(f"{root}:")
    shown = [each for each in found if not options.quiet or each.state == "damaged"]
    for line, colour in _listed(shown) if shown else ():
        say(line, colour)
    if not found and not options.quiet:
        say(no_root(root))
    return code, None


def no_root(directory: Path) -> str:
    """A line that says that a directory holds no checkpoints, and where they are."""
    from shardwise.ops.targets import where_to_look

    where = where_to_look(directory)
    return f"{directory} holds no checkpoints, which are directories called epoch_E_step_S. {where}".rstrip()


def _listed(found: list[ListedCheckpoint]) -> list[tuple[str, str | None]]:
    now = time.time()
    rows = [("STEP", "EPOCH", "AGE", "SIZE", "STATE", "POINTERS", "METRICS")]
    for each in found:
        state = each.state if each.state != "published" or each.verifiable else "published, no manifest"
        old = "?" if each.saved_at is None else age(now - each.saved_at)
        metrics = ", ".join(f"{name} {value:g}" for name, value in each.metrics.items())
        rows.append(
            (str(each.step), str(each.epoch), old, size(each.nbytes), state, " ".join(each.pointers) or "-", metrics)
        )
    lines = columns(rows, frozenset({0, 1, 2, 3}))
    shown: list[tuple[str, str | None]] = [(lines[0], None)]
    for line, each in zip(lines[1:], found, strict=True):
        shown.append((line, _STATE_COLOURS.get(each.state)))
        shown += [(f"      {problem}", None) for problem in each.problems]
        if each.writer is not None:
            where = f"process {each.writer.pid} on {each.writer.host}"
            gone = "" if each.writer.alive is not False else ", which has ended"
            shown.append((f"      {where}{gone}", None))
    return shown


def verify(options: argparse.Namespace) -> int:
    """``shardwise verify``."""
    from shardwise.ops import verify as work

    def one(path: Path) -> tuple[int, object]:
        with progress_bar(options.quiet) as progress:
            report = work.verify(path, threads=options.threads, progress=progress, digests=not options.quick)
        if not options.json:
            _print_report(report, options.quiet)
        code = {"whole": FINE, "damaged": FOUND, "unverifiable": UNVERIFIABLE}[report.status]
        return code, {"status": report.status, **record(report)}

    return _each(options.path, options.json, one)


def _print_report(report: VerifyReport, quiet: bool) -> None:
    for damage in report.damages:
        say(f"DAMAGED  {damage.describe()}", "red")
    if quiet:
        return
    told = {"extra  ": report.extra, "no digest": report.undigested}
    told |= {"checked": report.checked, "unchecked": report.unchecked}
    for word, lines in told.items():
        for line in lines:
            say(f"{word}  {line}")
    # Of files of torch the tensors are not counted.
    counted = count(report.files, "file") + (f", {count(report.tensors, 'tensor')}" if report.tensors else "")
    if report.status == "damaged":
        files = len({damage.file for damage in report.damages})
        say(f"{report.path} is damaged: {files} of {counted}")
    elif report.status == "unverifiable":
        say(f"{report.path} has no manifest and cannot be verified; nothing contradicts itself in {counted}")
    elif report.level == "sizes":
        say(f"{report.path} is complete: {counted}; sizes compared, digests not")
    else:
        rate = report.bytes_read / max(report.seconds, 1e-9)
        say(f"{report.path} is whole: {counted}, {size(report.bytes_read)} in {report.seconds:.2f} s ({size(rate)}/s)")


def inspect(options: argparse.Namespace) -> int:
    """``shardwise inspect``."""
    if options.html is not None:
        return _page(options)
    if options.against is not None or options.digests:
        raise MisuseError(
            "--against and --digests are for the page", hint="Add --html FILE, or use `shardwise diff` for text."
        )
    from shardwise.ops import inspect as work

    def one(path: Path) -> tuple[int, object]:
        found = work.inspect(path)
        if not options.json and not options.quiet:
            _print_description(found, options.tensors)
        elif not options.json:
            _print_unread(found, only_damaged=True)
        return FOUND if found.damaged else FINE, record(found) | {"nbytes": found.nbytes}

    return _each(options.path, options.json, one)


def _page(options: argparse.Namespace) -> int:
    from shardwise.ops.page import write_page

    if len(options.path) != 1 or options.tensors:
        raise MisuseError("--html takes one PATH and no --tensors", hint="Write a page for each path.")
    values = not options.digests
    with progress_bar(options.quiet) as progress:
        report = write_page(options.path[0], options.html, against=options.against, values=values, progress=progress)
    against = "" if report.against is None else f", against {report.against}"
    show(options, report, [f"wrote {report.html}: {report.path} with {count(report.tensors, 'tensor')}{against}"])
    for name in () if options.json else report.damaged:
        say(f"DAMAGED  {name}", "red")
    return FOUND if report.damaged else FINE


def _print_description(found: CheckpointDescription, every: bool) -> None:
    say(str(found.path))
    facts = {
        "epoch": found.epoch,
        "step": found.step,
        "ranks": found.ranks,
        "saved by": found.saved_by,
        "format": ", ".join(found.formats) or None,
        "manifest": "yes" if found.verifiable else "no: cannot be verified",
        "metrics": ", ".join(f"{name} {value:g}" for name, value in found.metrics.items()) or None,
    }
    for name, value in facts.items():
        if value is not None:
            say(f"  {name:<9} {value}")
    wide = max((len(component) for component in found.components), default=0)
    for component in found.components:
        own = [tensor for tensor in found.tensors if tensor.component == component]
        kinds = ", ".join(f"{count:,} {dtype}" for dtype, count in sorted(found.dtypes(component).items()))
        pieces = sum(len(tensor.pieces) > 1 for tensor in own)
        apart = f", {pieces} of them in pieces" if pieces else ""
        tensors = f"{count(len(own), 'tensor')}, {size(sum(tensor.spec.nbytes for tensor in own))}"
        say(f"  {component:<{max(9, wide)}} {tensors}: {kinds}{apart}")
        for line in _modules(found, component):
            say(f"    {line}")
    say(f"  {count(len(found.files), 'file')}, {size(found.nbytes)}")
    rows = [
        (f.path, f"{f.size:,}", f.format or "unknown", count(f.tensors, "tensor") if f.tensors else "")
        for f in found.files
    ]
    for line in columns(rows, frozenset({1})):
        say(f"    {line}")
    _print_unread(found, only_damaged=False)
    for tensor in found.tensors if every else ():
        spec = tensor.spec
        say(f"    {tensor.component}  {spec.name}  {spec.dtype} {list(spec.shape)}  {', '.join(tensor.files)}")


def _print_unread(found: CheckpointDescription, *, only_damaged: bool) -> None:
    for path, why in found.unread:
        damaged = path in found.damaged
        if damaged or not only_damaged:
            say(f"    {'DAMAGED' if damaged else 'not read'}: {path}: {why}", "red" if damaged else None)


def _modules(found: CheckpointDescription, component: str) -> list[str]:
    rows = []
    for module in found.modules(component):
        layers = f"{module.layers} layers" if module.layers > 1 else ""
        rows.append((module.name or "(no module)", f"{module.parameters:,}", size(module.nbytes), layers))
    return columns(rows, frozenset({1, 2}))


def diff(options: argparse.Namespace) -> int:
    """``shardwise diff``."""
    from shardwise.ops import diff as work

    with progress_bar(options.quiet) as progress:
        report = work.diff(options.a, options.b, values=not options.digests, progress=progress)
    if options.json:
        print_json({"differs": report.differs, **record(report)})
    else:
        _print_diff(report, options.quiet, options.tensors)
    if report.differs:
        return FOUND
    return UNVERIFIABLE if report.uncompared else FINE


def _print_diff(report: DiffReport, quiet: bool, tensors: bool) -> None:
    many = len(report.only_a) + len(report.only_b) + len(report.tensors) > _MOST_LINES and not tensors
    if many:
        _print_layers(report.layers)
    else:
        _print_tensors(report)
    for config in report.configs:
        where = f"{config.file}: {config.key}" if config.key else config.file
        say(f"~ {where}: {config.a!r} -> {config.b!r}")
    for component, name in report.uncompared[: _MOST_LINES if many else None]:
        say(f"? {component}  {name}  no digests in common: not compared")
    if quiet:
        return
    for note in report.notes:
        say(f"note  {note}")
    apart = len(report.only_a) + len(report.only_b)
    relative = [each.relative for each in report.tensors if each.relative is not None]
    most = f", relative difference at most {max(relative):.3g}" if relative else ""
    uncompared = f"{len(report.uncompared)} not compared, " if report.uncompared else ""
    say(
        f"{count(report.same, 'tensor')} equal ({report.by_digest} by digest), {len(report.tensors)} different{most}, "
        f"{uncompared}{apart} in one alone, {len(report.configs)} differences of configuration"
        f"{'; --tensors lists each' if many else ''}"
    )


def _print_tensors(report: DiffReport) -> None:
    for sign, colour, names in (("-", "red", report.only_a), ("+", "green", report.only_b)):
        for component, name in names:
            say(f"{sign} {component}  {name}", colour)
    rows = []
    for each in report.tensors:
        kinds = [f"{spec.dtype} {list(spec.shape)}" for spec in (each.a, each.b)]
        kind = kinds[0] if kinds[0] == kinds[1] else f"{kinds[0]} -> {kinds[1]}"
        numbers = ""
        if each.relative is not None:
            numbers = f"relative {each.relative:.3g}, largest {each.largest:.3g}, {each.elements:,} elements"
        rows.append(("~", each.component, each.a.name, kind, numbers))
    for line in columns(rows):
        say(line)


def _print_layers(layers: list[LayerDifference]) -> None:
    rows = []
    for each in layers:
        numbers = [f"{each.different} of {each.tensors} tensors differ"] if each.different else []
        if each.relative is not None:
            numbers.append(f"relative at most {each.relative:.3g}, largest {each.largest:.3g}")
        numbers += [f"{n} in {name} alone" for name, n in (("A", each.only_a), ("B", each.only_b)) if n]
        rows.append(("~", each.component, each.layer or "(no module)", ", ".join(numbers)))
    for line in columns(rows):
        say(line)


# --- the commands that write -----------------------------------------------------------------------------------------


def consolidate(options: argparse.Namespace) -> int:
    """``shardwise consolidate``."""
    from shardwise.ops import consolidate as work

    names = ("max_file_bytes", "dtype", "base", "diffusers_compatible", *_OF_SOURCE)
    report = _run(options, work.consolidate, options.path, options.output, names=names)
    return _tell_written(options, report, f"{count(report.tensors, 'tensor')} in {count(len(report.files), 'file')}")


def convert(options: argparse.Namespace) -> int:
    """``shardwise convert``."""
    from shardwise.ops import convert as work

    names = ("to", "optimizer", "epoch", "step", *_OF_SOURCE)
    report = _run(options, work.convert, options.source, options.target, names=names)
    optimizer = " and the optimizer's state" if report.optimizer else ""
    return _tell_written(options, report, count(report.tensors, "tensor") + optimizer)


def merge_adapter(options: argparse.Namespace) -> int:
    """``shardwise merge-adapter``."""
    from shardwise.ops import merge as work

    places, names = (options.base, options.adapter, options.output), ("max_file_bytes", "verify_export")
    report = _run(options, work.merge_adapter, *places, names=names)
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

    names = ("revision", "private", "message", "allow_unverified")
    try:
        report = _run(options, work.push, options.path, options.repo, names=names)
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
