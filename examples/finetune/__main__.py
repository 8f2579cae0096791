"""``python -m examples.finetune``: the command line."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from pathlib import Path
from types import FrameType

from examples.finetune.console import Console
from examples.finetune.errors import DemoError

_MIN_STEPS = 4


def parser() -> argparse.ArgumentParser:
    """The options."""
    made = argparse.ArgumentParser(
        prog="python -m examples.finetune",
        description="Fine-tune a real language model with FSDP2 on two processes, kill it in the middle of a save, "
        "resume on three, finish on one, and open the result with plain transformers. Takes a few minutes on two "
        "cores and about 5 GB of disk; needs no network.",
    )
    made.add_argument("--model", help="a local directory or a hub name; default: SmolLM2-135M-Instruct, from a package")
    made.add_argument(
        "--steps", type=_steps, default=8, help=f"training steps over all runs (at least {_MIN_STEPS}; 8)"
    )
    made.add_argument(
        "--out", type=Path, help="an empty or new directory that keeps everything; default: a temporary one"
    )
    made.add_argument("--keep", action="store_true", help="do not remove the temporary directory")
    return made


def _steps(text: str) -> int:
    steps = int(text)
    if steps < _MIN_STEPS:
        raise argparse.ArgumentTypeError(f"{steps} steps leave no room for the story; use at least {_MIN_STEPS}")
    return steps


def _terminate(number: int, frame: FrameType | None) -> None:
    # As an exception, so that the workers and the temporary directory are cleaned up.
    raise SystemExit(128 + number)


def main(arguments: list[str] | None = None) -> int:
    """Run the demo; returns the exit code: 0 if everything was as it should be."""
    options = parser().parse_args(arguments)
    signal.signal(signal.SIGTERM, _terminate)
    # The transformers library's own bars and advice would run through the lines of the demo.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from examples.finetune.orchestrator import Options, tell_the_story

    console = Console()
    try:
        ok = tell_the_story(Options(options.model, options.steps, options.out, options.keep), console)
    except DemoError as error:
        sys.stderr.write(f"\nThe demo stopped: {error}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("\nInterrupted; the workers are gone.\n")
        return 130
    return 0 if ok else 1


if __name__ == "__main__":
    raise SystemExit(main())
