"""Scripts with which shells complete the command line; they start no program, so that completing takes no time.

What is in them comes from the parser (`shardwise.cli.parsing.described`). Sources: the manuals of bash ("Programmable
Completion"), zsh (zshcompsys, ``_arguments``) and fish (``complete``).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from shardwise.cli.exits import FINE
from shardwise.cli.output import say

if TYPE_CHECKING:
    import argparse

#: What comes behind an option or stands as an argument: a path, one of several words, something else, or nothing.
Kind = Literal["path", "words", "text", "none"]
SHELLS = ("bash", "zsh", "fish")


@dataclass(frozen=True, slots=True)
class Option:
    """An option.

    Attributes:
        names: ``-q``, ``--quiet``.
        help: One line.
        kind: What comes behind it.
        words: Of the kind ``words``, these.
        optional: Whether it may also stand alone.
    """

    names: tuple[str, ...]
    help: str
    kind: Kind = "none"
    words: tuple[str, ...] = ()
    optional: bool = False


@dataclass(frozen=True, slots=True)
class Command:
    """A command.

    Attributes:
        name: Its name; empty for the program itself.
        help: One line.
        options: Its options.
        kind: What its arguments are.
        words: Of the kind ``words``, these.
    """

    name: str
    help: str
    options: tuple[Option, ...]
    kind: Kind = "none"
    words: tuple[str, ...] = ()

    @property
    def flags(self) -> list[str]:
        """Every name of every option."""
        return [name for option in self.options for name in option.names]


def completion(options: argparse.Namespace) -> int:
    """``shardwise completion``."""
    from shardwise.cli.parsing import described

    program, *commands = described()
    made = {"bash": _bash, "zsh": _zsh, "fish": _fish}[options.shell]
    for line in made(program, commands):
        say(line)
    return FINE


def _bash(program: Command, commands: Sequence[Command]) -> Iterator[str]:
    names = [command.name for command in commands]
    yield from (
        "# shardwise completion bash > ~/.local/share/bash-completion/completions/shardwise",
        "_shardwise() {",
        "    local IFS=$' \\t\\n' word command='' options='' words='' files=''",
        "    local current=${COMP_WORDS[COMP_CWORD]} previous=${COMP_WORDS[COMP_CWORD-1]}",
        '    for word in "${COMP_WORDS[@]:1:COMP_CWORD-1}"; do',
        f"        case $word in {'|'.join(names)}) command=$word; break ;; esac",
        "    done",
        "    case $command in",
    )
    for command in (program, *commands):
        sets = _bash_sets(command.kind, command.words if command.name else names)
        yield f"        '{command.name}') options='{' '.join(command.flags)}' {sets} ;;"
    yield from ("    esac", "    case $command:$previous in")
    for command in commands:
        for option in command.options:
            if option.kind != "none" and not option.optional:
                place = "|".join(f"{command.name}:{name}" for name in option.names)
                yield f"        {place}) options='' {_bash_sets(option.kind, option.words)} ;;"
    yield from (
        "    esac",
        "    [[ $current == -* ]] && words=$options files=''",
        "    COMPREPLY=()",
        "    IFS=$'\\n'",
        "    if [[ -n $files ]]; then",
        "        compopt -o filenames 2>/dev/null",
        '        COMPREPLY=($(compgen -f -- "$current"))',
        "    elif [[ -n $words ]]; then",
        '        COMPREPLY=($(compgen -W "${words// /$IFS}" -- "$current"))',
        "    fi",
        "}",
        "complete -F _shardwise shardwise",
    )


def _bash_sets(kind: Kind, words: Sequence[str]) -> str:
    return f"words='{' '.join(words)}' files='{'yes' if kind == 'path' else ''}'"


def _zsh(program: Command, commands: Sequence[Command]) -> Iterator[str]:
    yield from (
        "#compdef shardwise",
        '# shardwise completion zsh > "${fpath[1]}/_shardwise"',
        "_shardwise() {",
        "    local context state state_descr line",
        "    typeset -A opt_args",
        "    local -a commands=(",
        *(f"        {_quoted(f'{command.name}:{command.help}')}" for command in commands),
        "    )",
        "    _arguments -C \\",
        *(f"        {_zsh_option(option)} \\" for option in program.options),
        "        '1:command:->command' '*::argument:->argument'",
        "    case $state in",
        "        command) _describe command commands ;;",
        "        argument) case $line[1] in",
    )
    for command in commands:
        yield f"            {command.name}) _arguments \\"
        yield from (f"                {_zsh_option(option)} \\" for option in command.options)
        yield f"                {_quoted('*:argument:' + _zsh_action(command.kind, command.words))} ;;"
    yield from ("        esac ;;", "    esac", "}")
    # A file of $fpath is the function's body when it is called first; another is sourced.
    yield 'if [[ ${funcstack[1]} == _shardwise ]]; then _shardwise "$@"; else compdef _shardwise shardwise; fi'


def _zsh_option(option: Option) -> str:
    text = option.help.replace("\\", "\\\\").replace("[", "\\[").replace("]", "\\]").replace(":", "\\:")
    value = ""
    if option.kind != "none":
        value = f"{'::' if option.optional else ':'}value:{_zsh_action(option.kind, option.words)}"
    return " ".join(_quoted(f"{name}[{text}]{value}") for name in option.names)


def _zsh_action(kind: Kind, words: Sequence[str]) -> str:
    return {"path": "_files", "words": f"({' '.join(words)})"}.get(kind, " ")


def _fish(program: Command, commands: Sequence[Command]) -> Iterator[str]:
    yield "# shardwise completion fish > ~/.config/fish/completions/shardwise.fish"
    yield "complete -c shardwise -f"
    for option in program.options:
        yield f"complete -c shardwise -n __fish_use_subcommand {_fish_option(option)}"
    for command in commands:
        yield f"complete -c shardwise -n __fish_use_subcommand -a {command.name} -d {_quoted(command.help)}"
    for command in commands:
        here = f"complete -c shardwise -n '__fish_seen_subcommand_from {command.name}'"
        if command.kind != "none":
            yield f"{here} {_fish_value(command.kind, command.words)}".rstrip()
        for option in command.options:
            yield f"{here} {_fish_option(option)}"


def _fish_option(option: Option) -> str:
    names = [f"-l {name[2:]}" if name.startswith("--") else f"-s {name[1:]}" for name in option.names]
    value = "" if option.kind == "none" or option.optional else f" -r {_fish_value(option.kind, option.words)}"
    return f"{' '.join(names)}{value.rstrip()} -d {_quoted(option.help)}"


def _fish_value(kind: Kind, words: Sequence[str]) -> str:
    return {"path": "-F", "words": f"-f -a {_quoted(' '.join(words))}"}.get(kind, "-f")


def _quoted(text: str) -> str:
    """A word of a shell; the three agree on quotation marks."""
    return "'" + text.replace("'", "'\\''") + "'"
