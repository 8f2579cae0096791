"""``shardwise verify`` and its siblings: arguments in, reports out; the work is done by `shardwise.ops`.

The commands are defined in `parsing`; `commands` has what each does.
"""

from __future__ import annotations

import argparse
import io
import sys
import traceback
from collections.abc import Callable, Sequence

from shardwise.cli import output
from shardwise.cli.parsing import make_parser
from shardwise.errors import ShardwiseError, StorageError

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code.

    Args:
        arguments: What stands after the program's name; those of this process by default.
    """
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")  # an encoding may lack what a name has
    try:
        with output.warnings_told():
            return _done(arguments)
    finally:
        output.drop_output()  # what is left after an error, if it cannot be printed


def _done(arguments: Sequence[str] | None) -> int:
    try:
        try:
            options = make_parser().parse_args(arguments)
        except SystemExit:
            output.flush()  # --help may meet a full disk, too
            raise
        command: Callable[[argparse.Namespace], int] = options.command
        code = command(options)
        output.flush()  # a full disk or a closed pipe is to be seen here, and not at exit
        return code
    except ShardwiseError as error:
        output.tell_error(error)
        return output.code_of(error)
    except KeyboardInterrupt:
        return output.INTERRUPTED
    except BrokenPipeError:
        return output.MISUSE  # whoever read it has left (`| head`)
    except OSError as error:
        why = f"standard output cannot be written: {error.strerror or error}. Send it somewhere else."
        if error.filename is not None:
            why = str(StorageError.from_os(error, path=error.filename))
        elif isinstance(error, FileNotFoundError):
            why = f"the working directory is gone: {error.strerror}. Change to one that exists, or name whole paths."
        output.tell(f"shardwise: {why}")
        return output.MISUSE
    except Exception:  # noqa: BLE001  any other exit code than Python's, which is that of damage
        for line in traceback.format_exc().rstrip("\n").split("\n"):
            output.tell(line)
        output.tell("shardwise: this is an error of shardwise itself: please report it with the lines above")
        return output.CRASHED
