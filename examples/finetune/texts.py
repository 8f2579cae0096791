"""The training text, and its division into equal blocks."""

from __future__ import annotations

from collections.abc import Sequence

SENTENCES = (
    "A checkpoint is a promise that an interruption costs minutes and not weeks.",
    "Every rank writes the bytes that it holds, at the place where they belong in the final file.",
    "The layout of a file follows from names, shapes and types, so it is known before anything is written.",
    "A machine that stops in the middle of a save leaves a directory that nobody will mistake for a checkpoint.",
    "The manifest is written last, and one rename makes it all visible at once.",
    "Two processes saved the model, three went on with it, and one of them finished the work.",
    "A reader asks only for the ranges of bytes that its own part of the model needs.",
    "What was trained yesterday can be opened today by any tool that knows the format.",
)

#: Blocks of one step. 1, 2, 3 and 6 processes can share them equally, so that the mean loss over the processes is the
#: same number on each of these.
BLOCKS = 6
BLOCK_TOKENS = 20


def make_blocks(tokens: Sequence[int], count: int = BLOCKS, length: int = BLOCK_TOKENS) -> list[list[int]]:
    """Cut ``tokens`` into ``count`` blocks of ``length``, starting again at the beginning where they run out.

    Raises:
        ValueError: There are no tokens.
    """
    if not tokens:
        raise ValueError("the tokenizer makes no tokens of the training text")
    return [[tokens[(block * length + at) % len(tokens)] for at in range(length)] for block in range(count)]


def share(blocks: Sequence[list[int]], rank: int, world_size: int) -> list[list[int]]:
    """The blocks of one process.

    Raises:
        ValueError: They cannot be shared equally.
    """
    if len(blocks) % world_size:
        raise ValueError(f"{len(blocks)} blocks cannot be shared equally by {world_size} processes")
    return list(blocks[rank::world_size])
