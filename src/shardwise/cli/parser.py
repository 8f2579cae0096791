"""A parser of arguments that suggests, knows its own arguments, and prints as the other commands do."""

from __future__ import annotations

import argparse
import difflib
import re
from pathlib import Path
from typing import NoReturn

from shardwise.cli.output import printable, say

_WORD = re.compile(r"invalid choice: '([^']*)'|unrecognized arguments: (\S+)")


class Parser(argparse.ArgumentParser):
    """A parser that suggests what was meant instead of an unknown word."""

    def __init__(self, **options: object) -> None:
        #: For `completion`: each argument, one line about the command, and of the program its commands.
        self.arguments: list[argparse.Action] = []
        self.summary = ""
        self.commands: dict[str, Parser] = {}
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(**options)  # type: ignore[arg-type]

    def add_argument(self, *names: str, **options: object) -> argparse.Action:
        """Add an argument, and know it."""
        added = super().add_argument(*names, **options)  # type: ignore[arg-type]
        self.arguments.append(added)
        return added

    @property
    def words(self) -> set[str]:
        """The commands and the long names of all options, which may be mistyped."""
        own = {name for argument in self.arguments for name in argument.option_strings if name.startswith("--")}
        return own.union(self.commands, *(command.words for command in self.commands.values()))

    def add_path(self, name: str, text: str, **options: object) -> None:
        """Add an argument or option that is a path, with its help."""
        if not name.startswith("--"):
            options.setdefault("metavar", name.upper())
        self.add_argument(name, type=path_of, help=text, **options)

    def print_help(self, file: object = None) -> None:
        """Print the help; argparse itself would pass over a full disk."""
        for line in self.format_help().splitlines():
            say(line)

    def error(self, message: str) -> NoReturn:
        """Print usage and message, and leave with exit code 2."""
        found = _WORD.search(message)
        word = "" if found is None else (found[1] or found[2] or "").split("=")[0]
        near = difflib.get_close_matches(word, sorted(self.words), n=1) if word else []
        super().error(printable(f"{message}. Did you mean {near[0]}?" if near else message))


def path_of(text: str) -> Path:
    """An argument that is a path."""
    if not text:
        raise argparse.ArgumentTypeError("the path is empty")  # an unset variable must not mean the working directory
    return Path(text)
