"""Scripts with which shells complete the command line; they start no program, so that completing takes no time.

What is in them comes from the parser (`shardwise.cli.parsing` makes it). Sources: the manuals of bash ("Programmable
Completion"), zsh (zshcompsys, ``_arguments``) and fish (``complete``).
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from typing import Literal

from shardwise.cli.output import FINE, say
from shardwise.cli.parser import Parser, path_of

#: What comes behind an option or stands as an argument: a path, one of several words, something else, or nothing.
Kind = Literal["path", "words", "text", "none"]
SHELLS = ("bash", "zsh", "fish")


def completion(program: Parser, options: argparse.Namespace) -> int:
    """``shardwise completion``, for the parser of the whole program."""
    for line in {"bash": _bash, "zsh": _zsh, "fish": _fish}[options.shell](program):
        say(line)
    return FINE


def _kind(argument: argparse.Action | None) -> Kind:
    if argument is None or argument.nargs == 0:
        return "none"
    if argument.choices:
        return "words"
    return "path" if argument.type is path_of else "text"


def _words(argument: argparse.Action | None) -> list[str]:
    return [] if argument is None else [str(choice) for choice in argument.choices or ()]


def _options(parser: Parser) -> list[argparse.Action]:
    return [argument for argument in parser.arguments if argument.option_strings]


def _operand(parser: Parser) -> argparse.Action | None:
    """The first argument that is no option; further ones are of the same kind, or nothing that can be completed."""
    return next((argument for argument in parser.arguments if not argument.option_strings), None)


def _help(option: argparse.Action) -> str:
    return (option.help or "").replace("%%", "%")


def _bash(program: Parser) -> Iterator[str]:
    names = list(program.commands)
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
    for name, command in (("", program), *program.commands.items()):
        flags = " ".join(flag for option in _options(command) for flag in option.option_strings)
        sets = _bash_sets(_kind(_operand(command)), _words(_operand(command)) if name else names)
        yield f"        '{name}') options='{flags}' {sets} ;;"
    yield from ("    esac", "    case $command:$previous in")
    for name, command in program.commands.items():
        for option in _options(command):
            if _kind(option) != "none" and option.nargs != "?":
                place = "|".join(f"{name}:{flag}" for flag in option.option_strings)
                yield f"        {place}) options='' {_bash_sets(_kind(option), _words(option))} ;;"
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


def _zsh(program: Parser) -> Iterator[str]:
    yield from (
        "#compdef shardwise",
        '# shardwise completion zsh > "${fpath[1]}/_shardwise"',
        "_shardwise() {",
        "    local context state state_descr line",
        "    typeset -A opt_args",
        "    local -a commands=(",
        *(f"        {_quoted(f'{name}:{command.summary}')}" for name, command in program.commands.items()),
        "    )",
        "    _arguments -C \\",
        *(f"        {_zsh_option(option)} \\" for option in _options(program)),
        "        '1:command:->command' '*::argument:->argument'",
        "    case $state in",
        "        command) _describe command commands ;;",
        "        argument) case $line[1] in",
    )
    for name, command in program.commands.items():
        yield f"            {name}) _arguments \\"
        yield from (f"                {_zsh_option(option)} \\" for option in _options(command))
        yield f"                {_quoted('*:argument:' + _zsh_action(_operand(command)))} ;;"
    yield from ("        esac ;;", "    esac", "}")
    # A file of $fpath is the function's body when it is called first; another is sourced.
    yield 'if [[ ${funcstack[1]} == _shardwise ]]; then _shardwise "$@"; else compdef _shardwise shardwise; fi'


def _zsh_option(option: argparse.Action) -> str:
    text = _help(option).replace("\\", "\\\\").replace("[", "\\[").replace("]", "\\]").replace(":", "\\:")
    value = ""
    if _kind(option) != "none":
        value = f"{'::' if option.nargs == '?' else ':'}value:{_zsh_action(option)}"
    return " ".join(_quoted(f"{name}[{text}]{value}") for name in option.option_strings)


def _zsh_action(argument: argparse.Action | None) -> str:
    return {"path": "_files", "words": f"({' '.join(_words(argument))})"}.get(_kind(argument), " ")


def _fish(program: Parser) -> Iterator[str]:
    yield "# shardwise completion fish > ~/.config/fish/completions/shardwise.fish"
    yield "complete -c shardwise -f"
    for option in _options(program):
        yield f"complete -c shardwise -n __fish_use_subcommand {_fish_option(option)}"
    for name, command in program.commands.items():
        yield f"complete -c shardwise -n __fish_use_subcommand -a {name} -d {_quoted(command.summary)}"
    for name, command in program.commands.items():
        here, operand = f"complete -c shardwise -n '__fish_seen_subcommand_from {name}'", _operand(command)
        if operand is not None:
            yield f"{here} {_fish_value(operand)}".rstrip()
        for option in _options(command):
            yield f"{here} {_fish_option(option)}"


def _fish_option(option: argparse.Action) -> str:
    names = [f"-l {name[2:]}" if name.startswith("--") else f"-s {name[1:]}" for name in option.option_strings]
    value = "" if _kind(option) == "none" or option.nargs == "?" else f" -r {_fish_value(option)}"
    return f"{' '.join(names)}{value.rstrip()} -d {_quoted(_help(option))}"


def _fish_value(argument: argparse.Action) -> str:
    return {"path": "-F", "words": f"-f -a {_quoted(' '.join(_words(argument)))}"}.get(_kind(argument), "-f")


def _quoted(text: str) -> str:
    """A word of a shell; the three agree on quotation marks."""
    return "'" + text.replace("'", "'\\''") + "'"
