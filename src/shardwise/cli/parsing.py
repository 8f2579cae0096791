"""The commands and their options.

argparse, because it is there: typer takes several times as long to import as ``--help`` and ``ls`` take together.
Neither torch nor anything else that is heavy is imported before a command needs it.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from functools import partial

from shardwise._version import __version__
from shardwise.cli import commands as work
from shardwise.cli.completion import SHELLS, completion
from shardwise.cli.parser import Parser

_DESCRIPTION = "Offline work on checkpoints: look, compare, check, export, clean up, publish."
_EXITS = (
    "exit codes: 0 fine, 1 something was found (damage, a difference), 2 misuse (also: nothing there, or unreadable), "
    "3 unverifiable, 70 an error of shardwise itself, 130 interrupted"
)


def make_parser() -> Parser:
    """The parser of the whole command line; each command leaves its function in ``command``."""
    parser = Parser(prog="shardwise", description=_DESCRIPTION, epilog=_EXITS)
    parser.add_argument("--version", action="version", version=f"shardwise {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=Parser)

    def add(name: str, command: Callable[[argparse.Namespace], int], text: str, more: str, examples: str) -> Parser:
        epilog = f"examples:\n{examples}" + ("" if name == "completion" else f"\n\n{_EXITS}")
        added = parser.commands[name] = commands.add_parser(name, help=text, description=more, epilog=epilog)
        if name != "completion":
            added.add_argument("--json", action="store_true", help="print one JSON object (of several paths: a list)")
            added.add_argument("-q", "--quiet", action="store_true", help="print nothing but what is wrong")
        added.set_defaults(command=command)
        added.summary = text
        return added

    _add_reading(add)
    _add_consolidate(add)
    _add_conversions(add)
    _add_others(add, parser)
    return parser


_Add = Callable[[str, Callable[[argparse.Namespace], int], str, str, str], Parser]


def _add_reading(add: _Add) -> None:
    ls = add(
        "ls",
        work.ls,
        "list the checkpoints of a directory",
        "Steps, age, size, metrics, pointers and state of the checkpoints of a root, one line each. Damage is what\n"
        "sizes show; `verify` reads every byte.",
        "  shardwise ls checkpoints/\n  shardwise ls --watch checkpoints/",
    )
    ls.add_path("root", "the directory that holds the checkpoints", nargs="+")
    ls.add_argument(
        "--watch", type=float, nargs="?", const=2.0, metavar="SECONDS", help="list again every 2 seconds until Ctrl-C"
    )

    verify = add(
        "verify",
        work.verify,
        "compare a checkpoint with its manifest, byte by byte",
        "Say whether a checkpoint is what was saved, and if not what is damaged, by file and tensor.",
        "  shardwise verify checkpoints/\n  shardwise verify --quick checkpoints/epoch_0_step_*",
    )
    verify.add_path("path", "a checkpoint, its model/ or optim/, or a root (its LATEST is verified)", nargs="+")
    verify.add_argument("--quick", action="store_true", help="compare manifest, kinds and sizes; read no tensor")
    verify.add_argument("--threads", type=int, metavar="N", help="reads at once (default: the cores, at most 8)")

    inspect = add(
        "inspect",
        work.inspect,
        "show what is in a checkpoint",
        "Files and their formats by content, tensors, parameters by module, who wrote it and on what topology. --html\n"
        "writes a page with a map of the files, for any browser; with --against it shows what changed, layer by layer.",
        "  shardwise inspect checkpoints/\n  shardwise inspect --tensors model.safetensors\n"
        "  shardwise inspect run/epoch_0_step_200 --html report.html --against run/epoch_0_step_100",
    )
    inspect.add_path("path", "a checkpoint, a part of one, or a root (its LATEST is shown)", nargs="+")
    inspect.add_argument("--tensors", action="store_true", help="list every tensor")
    inspect.add_path("--html", "write a page about it instead of text", metavar="FILE")
    inspect.add_path("--against", "on the page: what changed since OTHER", metavar="OTHER")
    inspect.add_argument("--digests", action="store_true", help="with --against: compare digests alone; read no tensor")

    diff = add(
        "diff",
        work.diff,
        "compare two checkpoints or models",
        "Names, shapes, dtypes, and of each tensor (of each layer, where many differ) the relative difference and the\n"
        "largest; configurations too. Tensors with the same digest in both manifests are not read. Exit code 1 where\n"
        "anything differs.",
        "  shardwise diff run/epoch_0_step_100 run/epoch_0_step_200\n  shardwise diff run/LATEST/model /models/base",
    )
    diff.add_path("a", "a checkpoint, a component, a model, a file, a DCP directory")
    diff.add_path("b", "likewise")
    diff.add_argument("--tensors", action="store_true", help="list every tensor that differs, however many there are")
    diff.add_argument("--digests", action="store_true", help="compare digests alone; read no tensor")


def _add_consolidate(add: _Add) -> None:
    consolidate = add(
        "consolidate",
        work.consolidate,
        "make the Hugging Face export of a checkpoint",
        "Write the files that transformers, vLLM and PEFT open from a checkpoint saved without them: as shards, with\n"
        "torch_save, or by another tool: DCP, verl, accelerate's FSDP, DeepSpeed, one file per rank. What verify\n"
        "refuses is refused. One process, bounded memory; the checkpoint stays.",
        "  shardwise consolidate checkpoints/\n  shardwise consolidate run/epoch_0_step_500 --output /data/export",
    )
    consolidate.add_path("path", "a checkpoint, its model/ directory, or a root (its LATEST)")
    consolidate.add_path("--output", "where the export goes (default: PATH/consolidated)")
    consolidate.add_argument(
        "--dtype", choices=("float64", "float32", "float16", "bfloat16"), help="cast the floating tensors to it"
    )
    _add_max_file_size(consolidate, "as saved")
    consolidate.add_path("--base", "the base model, for tensors that are carried over from it")
    consolidate.add_argument(
        "--diffusers",
        dest="diffusers_compatible",
        action="store_true",
        default=None,
        help="name the files as diffusers expects (default: as saved)",
    )
    _add_source_options(consolidate)


def _add_conversions(add: _Add) -> None:
    convert = add(
        "convert",
        work.convert,
        "convert what another tool saved: to a Hugging Face model, to DCP, or to a checkpoint to go on from",
        "Write DST from SRC: DCP directories (bare, under model, under app, beside an optimizer), torch's sharded HF\n"
        "files, runs of NeMo AutoModel, Lightning's .ckpt and FSDP directories, .bin, .pt, .pth, torchtitan's Llama,\n"
        "or a checkpoint of shardwise. Only what is the model becomes a model. No code of a file runs. SRC stays.",
        "  shardwise convert run/step-1000 model/ --to hf --config base/\n"
        "  shardwise convert run/step-1000 checkpoints/ --to shards\n"
        "  shardwise convert last.ckpt model/ --to hf --config base/ --prefix net",
    )
    convert.add_path("source", "a directory, or a file of torch.save", metavar="SRC")
    convert.add_path("target", "the directory to write, which must not exist", metavar="DST")
    convert.add_argument(
        "--to",
        choices=("hf", "dcp", "shards"),
        required=True,
        help="hf: a Hugging Face model; dcp: {'model': state_dict} for torch.distributed.checkpoint; shards: a "
        "directory of checkpoints with one in it, which training goes on from",
    )
    convert.add_argument(
        "--optimizer",
        action=argparse.BooleanOptionalAction,
        help="whether the optimizer's state goes into shards (default: it does where there is one)",
    )
    convert.add_argument(
        "--epoch", type=int, metavar="N", help="of the checkpoint in shards (default: by SRC's name, 0)"
    )
    convert.add_argument("--step", type=int, metavar="N", help="likewise")
    _add_source_options(convert)

    merge = add(
        "merge-adapter",
        work.merge_adapter,
        "merge an adapter into its base model",
        "Write the base model with the adapter merged into it, byte for byte as peft's merge_and_unload leaves it,\n"
        "one module at a time. Quantized bases are dequantized. Base and adapter stay as they are.",
        "  shardwise merge-adapter /models/base run/LATEST merged/\n"
        "  shardwise merge-adapter org/model adapter/ merged/ --max-file-size 2GB",
    )
    merge.add_argument("base", metavar="BASE", help="the base model: a directory, a file, a hub id in the cache")
    merge.add_path("adapter", "a directory of peft's, a checkpoint, a root (its LATEST)")
    merge.add_path("output", "the directory to write", metavar="OUT")
    _add_max_file_size(merge, "as the base")
    _add_no_class_check(merge, default=True)


def _add_source_options(command: Parser) -> None:
    """What is to be known of a source that does not say it."""
    command.add_path("--config", "where config.json, the tokenizer and the like are", metavar="DIR")
    command.add_argument(
        "--prefix", help="what the model's names begin with in the source, where that is not clear; '' for all names"
    )
    command.add_argument(
        "--rope",
        choices=("interleaved", "halves"),
        help="of a Llama with torchtitan's names: how it rotates q and k (torchtitan and Meta: interleaved)",
    )
    command.add_argument(
        "--assume-complete", action="store_true", help="believe that no file is absent where nothing tells"
    )
    command.add_argument(
        "--master-weights", action="store_true", help="of DeepSpeed, the fp32 weights where 16-bit ones are there too"
    )
    _add_no_class_check(command)


def _add_no_class_check(command: Parser, default: bool | None = None) -> None:
    command.add_argument(
        "--no-class-check",
        dest="verify_export",
        action="store_false",
        default=default,
        help="write the model even if the class that config.json names would not load it",
    )


def _add_max_file_size(command: Parser, default: str) -> None:
    text = f"largest file, as 5GB or 500MiB (default: {default})"
    command.add_argument("--max-file-size", dest="max_file_bytes", type=_size, metavar="SIZE", help=text)


def _add_others(add: _Add, program: Parser) -> None:
    prune = add(
        "prune",
        work.prune,
        "delete old checkpoints by the retention policy",
        "Show which checkpoints the policy gives up; with --yes, delete them. Without --keep-... the policy is\n"
        "that of the newest checkpoint's settings. What a pointer leads to and the newest one stay.",
        "  shardwise prune checkpoints/ --keep-last 3\n  shardwise prune run/ --keep-last 2 --keep-best 1 --yes",
    )
    repair = add(
        "repair",
        work.repair,
        "remove what interrupted saves left and mend pointers",
        "Show what interrupted saves left and which pointers lead nowhere; with --yes, mend it. What is being written\n"
        "stays. Exit code 1 where something is left to do.",
        "  shardwise repair checkpoints/\n  shardwise repair checkpoints/ --yes",
    )
    for each in (prune, repair):
        each.add_path("root", "the directory that holds the checkpoints")
        each.add_argument("--yes", action="store_true", help="do it; without this nothing is changed")
    prune.add_argument("--keep-last", type=int, metavar="N", help="keep the newest N")
    prune.add_argument("--keep-every", type=int, metavar="K", help="keep those whose step is a multiple of K")
    prune.add_argument("--keep-best", type=int, metavar="N", help="keep the best N by the metric")
    prune.add_argument("--metric", default="default", metavar="KEY", help="its key in losses.json (default: default)")
    prune.add_argument("--metric-mode", choices=("min", "max"), default="min", help="whether lower is better or higher")

    push = add(
        "push",
        work.push,
        "upload a model to the Hugging Face Hub",
        "Verify a checkpoint's export or adapter, or a model's directory, and upload it as one commit. What verify\n"
        "refuses is refused.",
        "  shardwise push checkpoints/ my-org/my-model --private",
    )
    push.add_path("path", "a checkpoint, a root (its LATEST), a model's directory")
    push.add_argument("repo", metavar="REPO", help="organisation/name; made where it does not exist")
    push.add_argument("--revision", help="the branch (default: the repository's)")
    push.add_argument("--private", action="store_true", default=None, help="make a new repository private")
    push.add_argument("--message", help="of the commit")
    push.add_argument("--allow-unverified", action="store_true", help="upload also what has no manifest")

    script = add(
        "completion",
        partial(completion, program),
        "print a script with which a shell completes the command line",
        "The script knows commands and options and starts no program. Its first lines say where it goes.",
        "  shardwise completion bash > ~/.local/share/bash-completion/completions/shardwise\n"
        "  shardwise completion fish > ~/.config/fish/completions/shardwise.fish",
    )
    script.add_argument("shell", choices=SHELLS, metavar="SHELL", help=", ".join(SHELLS))


_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12} | {
    f"{letter}I": 2 ** (10 * power) for power, letter in enumerate("KMGT", 1)
}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?")


def _size(text: str) -> int:
    found = _SIZE.fullmatch(text.strip().upper())
    nbytes = int(float(found[1]) * _UNITS.get(found[2], 0)) if found is not None else 0
    if nbytes < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write 5GB, 500MB, 2GiB, or a number of bytes")
    return nbytes
