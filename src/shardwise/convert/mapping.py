"""Renaming by regular expressions, with the promise that nothing is lost. Pure.

A key mapping is what transformers calls ``key_mapping`` or, in older and custom models,
``_checkpoint_conversion_mapping``: patterns of names in the files, each with its replacement in the model. The first
pattern that matches a name decides.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence

from shardwise.errors import ConversionError

#: Lookaheads and lookbehinds, up to two levels of parentheses deep.
_ASSERTION = re.compile(r"\(\?[=!<](?:[^()]|\([^()]*\))*\)")
#: A group that catches something and has no group within, and a reference to one in a replacement.
_GROUP = re.compile(r"(?<!\\)\((?!\?)[^()]*\)")
_REFERENCE = re.compile(r"\\(?:(\d)|g<(\d+)>)")
#: Characters that match more than one text in a pattern, and occur in no name.
_MANY = re.compile(r"[*+?()\[\]{}|\\]")


def rename(names: Sequence[str], key_mapping: Mapping[str, str]) -> tuple[str, ...]:
    """Rename names of the files to those of the model: the first pattern that matches anywhere in a name applies.

    A pattern that is no regular expression, or that makes one name of two, is a `ConversionError`.
    """
    rules = [(_compiled(pattern), replacement) for pattern, replacement in key_mapping.items()]
    renamed = tuple(_first_match(name, rules) for name in names)
    clashing = sorted(name for name, count in Counter(renamed).items() if count > 1)
    if clashing:
        sources = [name for name, new in zip(names, renamed, strict=True) if new == clashing[0]]
        raise ConversionError(
            f"the key mapping makes one name of several: {', '.join(sources)} all become {clashing[0]!r}",
            tensor=clashing[0],
            hint="Narrow the patterns.",
        )
    return renamed


def revert(names: Sequence[str], key_mapping: Mapping[str, str]) -> tuple[str, ...]:
    """Rename names of the model to those of the files, such that `rename` with the same mapping gives ``names`` back.

    `ConversionError` where it would not, or where two names become one.
    """
    reversed_mapping = dict(_reverted(old, new) for old, new in key_mapping.items())
    in_files = rename(names, reversed_mapping)
    for name, file in zip(names, in_files, strict=True):
        # A pattern that matches many texts has become part of a name: the original text is unknown.
        if name != file and _MANY.search(file):
            raise ConversionError(
                f"the key mapping cannot be reverted: of {name!r} it would make {file!r}",
                tensor=name,
                hint="Write patterns of plain text and of groups that the replacement refers to, or give the model a "
                "state_dict_adapter.",
            )
    back = rename(in_files, key_mapping)
    trips = zip(names, in_files, back, strict=True)
    wrong = [f"{name} -> {file} -> {again}" for name, file, again in trips if name != again]
    if wrong:
        raise ConversionError(
            f"the key mapping does not give back {len(wrong)} of {len(names)} names: {'; '.join(wrong[:5])}",
            tensor=wrong[0].partition(" ")[0],
            hint="Write patterns that can be reverted, or give the model a state_dict_adapter.",
        )
    return in_files


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ConversionError(
            f"{pattern!r} in the key mapping is not a regular expression: {error}", hint="Correct the pattern."
        ) from error


def _first_match(name: str, rules: Sequence[tuple[re.Pattern[str], str]]) -> str:
    for pattern, replacement in rules:
        try:
            renamed, count = pattern.subn(replacement, name)
        except (re.error, IndexError) as error:
            raise ConversionError(
                f"the replacement {replacement!r} does not fit the pattern {pattern.pattern!r}: {error}",
                tensor=name,
                hint="Refer only to groups that the pattern has.",
            ) from error
        if count:
            return renamed
    return name


def _reverted(pattern: str, replacement: str) -> tuple[str, str]:
    """The rule for the other direction: the pattern of names that a rule produces, and what they were before.

    A group's text is carried over if the replacement refers to the group by its number. Anchors and assertions match no
    text, and are dropped.
    """
    text = _ASSERTION.sub("", pattern).removeprefix("^").removesuffix("$")
    groups: list[str] = _GROUP.findall(text)
    order: list[int] = []

    def caught(reference: re.Match[str]) -> str:
        number = int(reference[1] or reference[2])
        if not 0 < number <= len(groups) or number in order:
            return re.escape(reference[0])
        order.append(number)
        return str(groups[number - 1])

    start = "^" if replacement.startswith("^") else ""
    pieces = _REFERENCE.split(replacement.removeprefix("^"))
    literals = pieces[::3]
    references = list(_REFERENCE.finditer(replacement.removeprefix("^")))
    made = re.escape(literals[0]) + "".join(
        caught(reference) + re.escape(literal) for reference, literal in zip(references, literals[1:], strict=True)
    )
    numbers = iter(range(1, len(groups) + 1))

    def referred(group: re.Match[str]) -> str:
        number = next(numbers)
        return f"\\g<{order.index(number) + 1}>" if number in order else group[0]

    return start + made, _GROUP.sub(referred, text).replace("\\.", ".")
