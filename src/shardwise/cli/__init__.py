"""``shardwise verify`` and its siblings: arguments in, reports out; the work is done by `shardwise.ops`.

The commands are defined in `parsing`; `showing` has those that read, `changing` those that write.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
import traceback
from collections.abc import Callable, Sequence

from shardwise.cli.exits import CRASHED, INTERRUPTED, MISUSE, code_of
from shardwise.cli.output import text_of
from shardwise.cli.parsing import make_parser
from shardwise.errors import ShardwiseError, StorageError

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code.

    Args:
        arguments: What stands after the program's name; those of this process by default.
    """
    options = make_parser().parse_args(arguments)
    command: Callable[[argparse.Namespace], int] = options.command
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files may be no text in any encoding
    try:
        code = command(options)
        if sys.stdout is not None:
            sys.stdout.flush()  # a full disk or a closed pipe is to be seen here, and not at exit
        return code
    except ShardwiseError as error:
        _say(text_of(error))
        return code_of(error)
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        _drop_output()  # whoever read it has left (`| head`)
        return MISUSE
    except OSError as error:
        try:
            sys.stdout.flush()
        except OSError:
            _drop_output()
        _say(str(StorageError.from_os(error, path=error.filename or "standard output, or the working directory")))
        return MISUSE
    except Exception:  # noqa: BLE001  any other exit code than Python's, which is that of damage
        traceback.print_exc()
        _say("this is an error of shardwise itself: please report it with the lines above")
        return CRASHED


def _say(text: str) -> None:
    print(f"shardwise: {text}", file=sys.stderr)


def _drop_output() -> None:
    """What could not be printed goes nowhere, so that Python does not complain about it at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    sys.exit(main())
