"""The commands that only read: ls, verify, inspect, diff."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from shardwise.cli.exits import FINE, FOUND, UNVERIFIABLE, code_of, gravest
from shardwise.cli.output import Bar, age, clear_screen, columns, flush, print_json, record, say, size, tell_error
from shardwise.errors import MisuseError, ShardwiseError

if TYPE_CHECKING:
    import argparse

    from shardwise.ops.diff import DiffReport
    from shardwise.ops.inspect import CheckpointDescription
    from shardwise.ops.listing import ListedCheckpoint
    from shardwise.ops.verify import VerifyReport

_STATE_COLOURS = {
    "damaged": "red",
    "being written": "yellow",
    "claimed": "yellow",
    "interrupted": "grey",
    "being deleted": "grey",
}


def _each(paths: list[Path], json: bool, one: Callable[[Path], tuple[int, object]]) -> int:
    """Do something for each path; a path that fails does not keep the others.

    Args:
        paths: The paths.
        json: Print the results: of one path an object, of several a list.
        one: Gives exit code and result.
    """
    codes: list[int] = []
    results: list[object] = []
    for path in paths:
        try:
            code, result = one(path)
        except ShardwiseError as error:
            if len(paths) == 1:
                raise
            tell_error(error, f"{path}: ")
            code, result = code_of(error), {"requested": str(path), "error": error.to_record()}
        codes.append(code)
        results.append(result)
    if json:
        print_json(results[0] if len(paths) == 1 else results)
    return gravest(codes)


def ls(options: argparse.Namespace) -> int:
    """``shardwise ls``."""
    if options.watch is None:
        return _each(options.root, options.json, lambda root: _list(root, options, len(options.root) > 1))
    if options.json or not options.watch > 0:
        raise MisuseError("--watch takes a number of seconds above 0, and no --json", hint="Leave one of them out.")
    while True:
        clear_screen()
        _each(options.root, False, lambda root: _list(root, options, len(options.root) > 1))
        flush()
        time.sleep(options.watch)


def _list(root: Path, options: argparse.Namespace, titled: bool) -> tuple[int, object]:
    from shardwise.ops.listing import list_checkpoints

    found = list_checkpoints(root)
    code = FOUND if any(each.state == "damaged" for each in found) else FINE
    if options.json:
        return code, [record(each) for each in found]
    if titled:
        say(f"{root}:")
    shown = [each for each in found if not options.quiet or each.state == "damaged"]
    for line, colour in _listed(shown):
        say(line, colour)
    if not found and not options.quiet:
        inside = [path.name for path in sorted(root.iterdir()) if _is_root(path)]
        say(f"{root} holds no checkpoints" + (f"; directories in it do: {', '.join(inside[:8])}" if inside else ""))
    return code, None


def _is_root(path: Path) -> bool:
    """Whether checkpoints are in a directory; what cannot be listed is not one, since nobody asked for it."""
    from shardwise.ops.listing import list_checkpoints

    try:
        return path.is_dir() and bool(list_checkpoints(path))
    except ShardwiseError:
        return False


def _listed(found: list[ListedCheckpoint]) -> list[tuple[str, str | None]]:
    if not found:
        return []
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
        bar = Bar(options.quiet)
        try:
            report = work.verify(path, threads=options.threads, progress=bar.progress, digests=not options.quick)
        finally:
            bar.close()
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
    for name in report.extra:
        say(f"extra    {name}")
    for name in report.undigested:
        say(f"no digest  {name}")
    for what in report.checked:
        say(f"checked  {what}")
    for what in report.unchecked:
        say(f"unchecked  {what}")
    counted = f"{report.files} files, {report.tensors} tensors"
    if report.status == "damaged":
        files = len({damage.file for damage in report.damages})
        say(f"{report.path} is damaged: {files} of {counted}")
    elif report.status == "unverifiable":
        say(f"{report.path} has no manifest and cannot be verified; nothing contradicts itself in its {counted}")
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
    bar = Bar(options.quiet)
    try:
        report = write_page(
            options.path[0],
            options.html,
            against=options.against,
            values=not options.digests,
            progress=bar.progress,
        )
    finally:
        bar.close()
    if options.json:
        print_json(record(report))
    elif not options.quiet:
        against = "" if report.against is None else f", against {report.against}"
        say(f"wrote {report.html}: {report.path} with {report.tensors} tensors{against}")
    for name in () if options.json else report.damaged:
        say(f"DAMAGED  {name}", "red")
    return FOUND if report.damaged else FINE


def _print_description(found: CheckpointDescription, tensors: bool) -> None:
    say(str(found.path))
    saved_by = [] if found.version is None else [f"shardwise {found.version}"]
    ranks = None if found.world_size is None else str(found.world_size)
    if ranks is None and found.writers:
        ranks = f"not recorded; writers by the files' names: {len(found.writers)}"
    facts = {
        "epoch": found.epoch,
        "step": found.step,
        "ranks": ranks,
        "saved by": ", ".join([*saved_by, *found.tools]) or None,
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
        say(
            f"  {component:<{max(9, wide)}} {len(own)} tensors, {size(sum(t.spec.nbytes for t in own))}: {kinds}{apart}"
        )
        for line in _modules(found, component):
            say(f"    {line}")
    say(f"  {len(found.files)} files, {size(found.nbytes)}")
    rows = [
        (f.path, f"{f.size:,}", f.format or "unknown", f"{f.tensors} tensors" if f.tensors else "") for f in found.files
    ]
    for line in columns(rows, frozenset({1})) if rows else ():
        say(f"    {line}")
    _print_unread(found, only_damaged=False)
    for tensor in found.tensors if tensors else ():
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

    bar = Bar(options.quiet)
    try:
        report = work.diff(options.a, options.b, values=not options.digests, progress=bar.progress)
    finally:
        bar.close()
    if options.json:
        print_json({"differs": report.differs, **record(report)})
    else:
        _print_diff(report, options.quiet)
    if report.differs:
        return FOUND
    return UNVERIFIABLE if report.uncompared else FINE


def _print_diff(report: DiffReport, quiet: bool) -> None:
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
    for line in columns(rows) if rows else ():
        say(line)
    for config in report.configs:
        where = f"{config.file}: {config.key}" if config.key else config.file
        say(f"~ {where}: {config.a!r} -> {config.b!r}")
    for component, name in report.uncompared:
        say(f"? {component}  {name}  no digests in common: not compared")
    if quiet:
        return
    for note in report.notes:
        say(f"note  {note}")
    apart = len(report.only_a) + len(report.only_b)
    relative = [each.relative for each in report.tensors if each.relative is not None]
    most = f", relative difference at most {max(relative):.3g}" if relative else ""
    say(
        f"{report.same} tensors equal ({report.by_digest} by digest), {len(report.tensors)} different{most}, "
        f"{apart} in one alone, {len(report.configs)} differences of configuration"
    )
