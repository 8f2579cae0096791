"""``shardwise verify`` and its siblings: arguments in, reports out.

argparse, because it is there: nothing else has to be imported before ``--help`` answers, and neither torch nor anything
heavy is imported before a command needs it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from shardwise._version import __version__
from shardwise.errors import FormatError, IntegrityError, ShardwiseError, TensorError, UnverifiableError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    from shardwise.ops.inspect import CheckpointDescription
    from shardwise.ops.verify import Progress, VerifyReport

#: Exit codes. Unverifiable is not whole: a script that goes on after 0 must not go on with what nobody checked.
WHOLE, DAMAGED, MISUSE, UNVERIFIABLE = 0, 1, 2, 3
_INTERRUPTED = 130

_EXITS = (
    "exit codes: 0 whole, 1 damaged, 2 misuse (also: nothing there, or unreadable), "
    "3 unverifiable (no manifest, and nothing wrong in the headers)"
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code.

    Args:
        arguments: What stands after the program's name; those of this process by default.
    """
    options = _parser().parse_args(arguments)
    command: Callable[[argparse.Namespace], int] = options.command
    try:
        return command(options)
    except ShardwiseError as error:
        print(f"shardwise: {error}", *error.__notes__, sep="\n", file=sys.stderr)
        return _exit_code(error)
    except KeyboardInterrupt:
        return _INTERRUPTED
    except BrokenPipeError:
        # Whoever read the output has left (`| head`); Python must not complain about it at exit either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return MISUSE


def _exit_code(error: ShardwiseError) -> int:
    if isinstance(error, UnverifiableError):
        return UNVERIFIABLE
    return DAMAGED if isinstance(error, (FormatError, IntegrityError, TensorError)) else MISUSE


def _path(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError("the path is empty")  # an unset variable must not mean the working directory
    return Path(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="shardwise", description="Offline work on checkpoints.")
    parser.add_argument("--version", action="version", version=f"shardwise {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    verify = commands.add_parser(
        "verify", help="compare a checkpoint with its manifest, byte by byte", description=_VERIFY, epilog=_EXITS
    )
    verify.add_argument(
        "path", type=_path, help="a checkpoint, its model/ or optim/, or a root (its LATEST is verified)"
    )
    verify.add_argument("--quick", action="store_true", help="compare manifest, kinds and sizes; read no tensor")
    verify.add_argument("--json", action="store_true", help="print the report as one JSON object")
    verify.add_argument("--threads", type=int, metavar="N", help="reads at once (default: the cores, at most 8)")
    verify.set_defaults(command=_verify)

    inspect = commands.add_parser("inspect", help="show what is in a checkpoint", epilog=_INSPECT_EXITS)
    inspect.add_argument("path", type=_path, help="a checkpoint, a part of one, or a root (its LATEST is shown)")
    inspect.add_argument("--json", action="store_true", help="print the description as one JSON object")
    inspect.add_argument("--tensors", action="store_true", help="list every tensor")
    inspect.set_defaults(command=_inspect)

    consolidate = commands.add_parser(
        "consolidate",
        help="make the Hugging Face export of a checkpoint",
        description=_CONSOLIDATE,
        epilog=_CONSOLIDATE_EXITS,
    )
    consolidate.add_argument("path", type=_path, help="a checkpoint, its model/ directory, or a root (its LATEST)")
    consolidate.add_argument("--output", type=_path, help="where the export goes (default: PATH/consolidated)")
    consolidate.add_argument(
        "--prefix", help="what the model's names begin with in a DCP directory that does not tell; '' for all names"
    )
    consolidate.add_argument("--base", type=_path, help="the base model, for tensors that are carried over from it")
    consolidate.add_argument(
        "--diffusers", action="store_true", default=None, help="name the files as diffusers expects (default: as saved)"
    )
    consolidate.add_argument(
        "--assume-complete", action="store_true", help="believe that no file is absent where nothing tells"
    )
    consolidate.add_argument(
        "--no-class-check",
        dest="verify_export",
        action="store_false",
        default=None,
        help="write the export even if the class that config.json names would not load it",
    )
    consolidate.set_defaults(command=_consolidate)
    return parser


_VERIFY = "Say whether a checkpoint is what was saved, and if not what is damaged, by file and tensor."
_INSPECT_EXITS = "exit codes: 0 done, 1 the manifest or a header is damaged, 2 misuse (also: nothing there)"
_CONSOLIDATE = (
    "Write the files that transformers, vLLM and PEFT open from a checkpoint saved without them: as shards, with "
    "torch_save, or by another tool's DCP. What verify refuses is refused. One process, bounded memory; the checkpoint "
    "stays."
)
_CONSOLIDATE_EXITS = (
    "exit codes: 0 written, 1 damaged, 2 misuse (also: nothing there, an interrupted save, no model), "
    "3 nothing says whether it is whole"
)


def _verify(options: argparse.Namespace) -> int:
    from shardwise.ops.verify import verify

    bar = _Bar()
    try:
        report = verify(options.path, threads=options.threads, progress=bar.progress, digests=not options.quick)
    finally:
        bar.close()
    if options.json:
        print(json.dumps(_verify_record(report), indent=1))
    else:
        _print_report(report)
    return {"whole": WHOLE, "damaged": DAMAGED, "unverifiable": UNVERIFIABLE}[report.status]


def _print_report(report: VerifyReport) -> None:
    for damage in report.damages:
        print(f"DAMAGED  {damage.describe()}")
    for name in report.extra:
        print(f"extra    {name}")
    for name in report.undigested:
        print(f"no digest  {name}")
    for what in report.checked:
        print(f"checked  {what}")
    for what in report.unchecked:
        print(f"unchecked  {what}")
    counted = f"{report.files} files, {report.tensors} tensors"
    if report.status == "damaged":
        files = len({damage.file for damage in report.damages})
        print(f"{report.path} is damaged: {files} of {counted}")
    elif report.status == "unverifiable":
        print(f"{report.path} has no manifest and cannot be verified; nothing contradicts itself in its {counted}")
    elif report.level == "sizes":
        print(f"{report.path} is complete: {counted}; sizes compared, digests not")
    else:
        rate = report.bytes_read / max(report.seconds, 1e-9)
        print(
            f"{report.path} is whole: {counted}, {_size(report.bytes_read)} in {report.seconds:.2f} s ({_size(rate)}/s)"
        )


def _verify_record(report: VerifyReport) -> dict[str, object]:
    return {
        "status": report.status,
        **_record(report),
        "requested": str(report.requested),
        "path": str(report.path),
    }


def _record(value: DataclassInstance) -> dict[str, object]:
    """As ``dataclasses.asdict``, which would leave named tuples to become lists."""
    return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}


def _plain(value: object) -> object:
    if is_dataclass(value) and not isinstance(value, type):
        return _record(value)
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return {name: _plain(each) for name, each in value._asdict().items()}
    if isinstance(value, Mapping):
        return {name: _plain(each) for name, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, (list, tuple)) else value


def _inspect(options: argparse.Namespace) -> int:
    from shardwise.ops.inspect import inspect

    found = inspect(options.path)
    if options.json:
        record = _record(found) | {"path": str(found.path), "nbytes": found.nbytes, "metrics": dict(found.metrics)}
        print(json.dumps(record, indent=1))
    else:
        _print_description(found, options.tensors)
    return WHOLE


def _print_description(found: CheckpointDescription, tensors: bool) -> None:
    print(found.path)
    facts = {
        "epoch": found.epoch,
        "step": found.step,
        "ranks": found.world_size,
        "saved by": None if found.version is None else f"shardwise {found.version}",
        "manifest": "yes" if found.verifiable else "no: cannot be verified",
        "metrics": ", ".join(f"{name} {value:g}" for name, value in found.metrics.items()) or None,
    }
    for name, value in facts.items():
        if value is not None:
            print(f"  {name:<9} {value}")
    for component in found.components:
        own = [tensor for tensor in found.tensors if tensor.component == component]
        kinds = ", ".join(f"{count:,} {dtype}" for dtype, count in sorted(found.dtypes(component).items()))
        print(f"  {component:<9} {len(own)} tensors, {_size(sum(t.spec.nbytes for t in own))}: {kinds}")
    print(f"  {len(found.files)} files, {_size(found.nbytes)}")
    width = max((len(file.path) for file in found.files), default=0)
    for file in found.files:
        held = f"  {file.tensors} tensors" if file.tensors else ""
        print(f"    {file.path:<{width}}  {file.size:>14,}{held}")
    for path, why in found.unread:
        print(f"    not read: {path}: {why}")
    for tensor in found.tensors if tensors else ():
        spec = tensor.spec
        print(f"    {tensor.component}  {spec.name}  {spec.dtype} {list(spec.shape)}  {', '.join(tensor.files)}")


def _consolidate(options: argparse.Namespace) -> int:
    from shardwise.ops.consolidate import consolidate

    bar = _Bar()
    try:
        report = consolidate(
            options.path,
            options.output,
            progress=bar.progress,
            prefix=options.prefix,
            base=options.base,
            diffusers_compatible=options.diffusers,
            assume_complete=options.assume_complete,
            verify_export=options.verify_export,
        )
    finally:
        bar.close()
    for note in report.notes:
        print(f"note  {note}", file=sys.stderr)
    print(f"wrote {report.path}: {report.tensors} tensors in {len(report.files)} files, {_size(report.nbytes)}")
    return WHOLE


def _size(nbytes: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if nbytes < 1000 or unit == "GB":
            break
        nbytes /= 1000
    return f"{nbytes:.0f} bytes" if unit == "bytes" else f"{nbytes:.2f} {unit}"


class _Bar:
    """A progress bar on standard error, where that is a terminal."""

    def __init__(self) -> None:
        self.progress: Progress | None = None
        self._close: Callable[[], None] | None = None
        if not sys.stderr.isatty():
            return
        from tqdm import tqdm

        bar = tqdm(unit="B", unit_scale=True, leave=False, file=sys.stderr)

        def told(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        self.progress, self._close = told, bar.close

    def close(self) -> None:
        """Remove the bar."""
        if self._close is not None:
            self._close()


if __name__ == "__main__":
    sys.exit(main())
