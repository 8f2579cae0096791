r"""What commands print: no name steers the terminal, and what cannot be printed or was interrupted ends as documented.

Names of tensors, files and metrics, values of configurations and messages come from whoever wrote the files.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tests.ops.checkpoints import saved
from tests.ops.damaged import save_dcp

from shardwise.cli import main
from shardwise.cli.output import columns, printable
from shardwise.ops.verify import Progress

#: Sets a terminal's title, clears its screen, begins another line, turns the direction, and is not UTF-8.
EVIL = "a\x1b]0;owned\x07\x1b[2J\n+ model  fake\r\u202e\u2028\x9b\udcffz"


def unprintable(text: str) -> set[str]:
    return {char for char in text if not char.isprintable()} - {"\n"}


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("layer.0 é 漢", "layer.0 é 漢"),
        ("\x1b[2J", r"\x1b[2J"),
        ("a\nb\tc\r", r"a\nb\tc\r"),
        ("\u202e\u2066\u2028\x9b\x7f", r"\u202e\u2066\u2028\x9b\x7f"),
        ("\udcff\U000e0001", r"\udcff\U000e0001"),
    ],
)
def test_printable(text: str, shown: str) -> None:
    assert printable(text) == shown


def test_columns_are_measured_as_they_are_printed() -> None:
    assert columns([("\n", "x"), ("abcd", "y")]) == [r"\n    x", "abcd  y"]


def test_only_one_module_prints() -> None:
    import shardwise.cli

    (folder,) = shardwise.cli.__path__
    printing = {path.name for path in Path(folder).glob("*.py") if "print(" in path.read_text()}
    assert printing == {"output.py"}


@pytest.fixture
def evil(tmp_path: Path) -> Path:
    """A place whose name, files, tensors, configurations, metadata and metrics are all hostile."""
    top = tmp_path / f"dir{EVIL}"
    model, other, dcp = top / "hf", top / "other", top / "dcp"
    for number, directory in enumerate((model, other)):
        directory.mkdir(parents=True)
        tensors = {f"{EVIL.replace(chr(0xDCFF), '')}{number}": torch.ones(2), "w": torch.full((3,), float(number))}
        save_file(tensors, directory / "model.safetensors", metadata={"k": EVIL.replace("\udcff", "")})
        config = {"model_type": f"gpt2{EVIL}{number}", f"key{EVIL}": f"{EVIL}{number}", "transformers_version": EVIL}
        (directory / "config.json").write_text(json.dumps(config))
        (directory / f"{EVIL}.json").write_text(EVIL.replace("\udcff", ""))
        (directory / f"{EVIL}.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}garbage")
    torch.save({f"{EVIL}": torch.ones(2), EVIL + "f": print}, top / "weights.pt")
    save_dcp({f"model.{EVIL.replace(chr(0xDCFF), '')}": torch.ones(3)}, dcp)
    root = saved(top / "root", (1, 2)).parent
    losses = root / "epoch_0_step_1" / "losses.json"
    losses.write_text(json.dumps({f"{EVIL}": 1.0}))
    (root / ".saving-epoch_0_step_4").mkdir()
    (root / f"MINE{EVIL}").symlink_to(f"nowhere{EVIL}")
    (root / "epoch_0_step_3").mkdir()
    (root / "epoch_0_step_3" / "manifest.json").write_text(EVIL.replace("\udcff", ""))
    return top


def calls(top: Path) -> list[list[str]]:
    model, other, dcp, root = (str(top / name) for name in ("hf", "other", "dcp", "root"))
    pt, out = str(top / "weights.pt"), str(top / f"out{EVIL}")
    return [
        ["ls", root],
        ["ls", root, model, f"nowhere{EVIL}"],
        *(["inspect", "--tensors", each] for each in (model, dcp, root, pt, f"{model}/{EVIL}.safetensors")),
        ["inspect", model, "--html", f"{out}.html"],
        *(["verify", each] for each in (model, dcp, root, pt, f"{top}/nowhere{EVIL}")),
        ["diff", model, other],
        ["diff", f"{model}/model.safetensors", f"{other}/model.safetensors"],
        ["diff", f"{root}/epoch_0_step_3", root],
        *(["merge-adapter", model, each, out] for each in (other, dcp, root)),
        *(["consolidate", each, "--output", out] for each in (model, dcp, root, pt)),
        *(["convert", each, f"{out}-{to}", "--to", to] for each in (model, dcp, root, pt) for to in ("hf", "shards")),
        ["prune", root, "--keep-last", "1"],
        ["prune", root, "--keep-best", "1", "--metric", EVIL],
        ["repair", root],
        ["repair", root, "--yes"],
        *(["push", each, f"org/{EVIL}"] for each in (model, root)),
    ]


def test_no_name_steers_the_terminal(
    evil: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    seen = ""
    for arguments in calls(evil):
        code = main(arguments)
        out, err = capfd.readouterr()
        assert code in (0, 1, 2, 3), (arguments, out, err)
        assert not unprintable(out + err), (arguments, out, err)
        assert "\n+ model  fake" not in out + err
        seen += out
    assert r"\x1b]0;owned\x07" in seen


@pytest.mark.parametrize(
    "arguments", [["verify", "--" + EVIL.replace(" ", ""), "x"], ["convert", "a", "b", "--to", EVIL], [EVIL]]
)
def test_no_argument_steers_the_terminal(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(arguments)
    assert not unprintable(capsys.readouterr().err)


def test_a_hub_that_does_not_answer_is_misuse(tmp_path: Path) -> None:
    save_file({"w": torch.ones(2)}, tmp_path / "model.safetensors")
    arguments = ["push", "--allow-unverified", tmp_path, "org/name"]
    nobody = os.environ | {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": "none"}
    for env in (nobody, nobody | {"HF_HUB_OFFLINE": "1"}):
        with started(arguments, stdout=subprocess.DEVNULL, env=env) as process:
            _, told = process.communicate(timeout=120)
        assert process.returncode == 2
        assert "the Hub cannot be reached" in told
        assert "Traceback" not in told


def test_json_has_every_character(evil: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "--json", str(evil / "hf")]) == 1
    out = capsys.readouterr().out
    assert not unprintable(out)
    names = {tensor["spec"]["name"] for tensor in json.loads(out)["tensors"]}
    assert f"{EVIL.replace(chr(0xDCFF), '')}0" in names


def test_warnings_are_told_on_a_line_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = EVIL.replace("\udcff", "")  # pytest's workers collect it, and cannot send half a character on

    def warning(*_: object, **__: object) -> tuple[()]:
        logging.getLogger("another.library").warning("careful: %s", text)
        warnings.warn(text, stacklevel=1)
        return ()

    monkeypatch.setattr("shardwise.ops.listing.list_checkpoints", warning)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert main(["ls", str(tmp_path)]) == 0
    told = capsys.readouterr().err
    assert told.startswith("shardwise: warning: careful: a\\x1b")
    assert (len(told.splitlines()), unprintable(told)) == (2, set())


# --- one damaged file of a directory ---------------------------------------------------------------------------------


def test_a_damaged_file_keeps_no_other_from_being_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file({"w": torch.ones(2)}, tmp_path / "model.safetensors")
    broken = tmp_path / "other.safetensors"
    broken.write_bytes(b"\xff" * 40)
    assert main(["inspect", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert "DAMAGED: other.safetensors: " in out
    assert "1 tensor, 8 bytes: 2 F32" in out
    assert main(["inspect", "--json", str(tmp_path)]) == 1
    report = json.loads(capsys.readouterr().out)
    assert (report["damaged"], report["unread"][0][0]) == (["other.safetensors"], "other.safetensors")
    assert main(["inspect", "--quiet", str(tmp_path)]) == 1
    assert capsys.readouterr().out.startswith("    DAMAGED: other.safetensors: ")
    page = tmp_path / "page.html"
    assert main(["inspect", str(tmp_path), "--html", str(page)]) == 1
    assert capsys.readouterr().out.splitlines()[1:] == ["DAMAGED  other.safetensors"]
    assert '"unread":[["other.safetensors"' in page.read_text()
    page.unlink()
    for more in ([], ["--html", str(page)]):  # of that very file there is nothing else to show
        assert main(["inspect", str(broken), *more]) == 1
        assert "other.safetensors" in capsys.readouterr().err
    assert not page.exists()


def test_damaged_files_of_torch_and_of_dcp(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file({"w": torch.ones(2)}, tmp_path / "model.safetensors")
    torch.save([1, 2], tmp_path / "whole.pt")
    assert main(["inspect", str(tmp_path)]) == 0
    assert "not read: whole.pt: " in capsys.readouterr().out
    torch.save({"w": torch.ones(200)}, tmp_path / "cut.pt")
    os.truncate(tmp_path / "cut.pt", 700)
    metadata = save_dcp({"w": torch.ones(3)}, tmp_path / "dcp") / ".metadata"
    metadata.write_bytes(metadata.read_bytes()[:40])
    assert main(["inspect", "--json", str(tmp_path)]) == 1
    assert set(json.loads(capsys.readouterr().out)["damaged"]) == {"cut.pt", "dcp/.metadata"}


# --- processes of their own ------------------------------------------------------------------------------------------

#: Fills more than a pipe and a buffer hold.
_MANY = 4000


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("many")
    save_file({f"layer.{number}.weight": torch.ones(1) for number in range(_MANY)}, directory / "model.safetensors")
    return directory


def started(arguments: Sequence[str | Path], **options: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "shardwise", *map(str, arguments)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, **options)  # type: ignore[call-overload,no-any-return]


@pytest.mark.parametrize("arguments", [["--help"], ["completion", "bash"], ["inspect"], ["inspect", "--json"]])
def test_a_full_standard_output(arguments: list[str], many: Path) -> None:
    paths = [many] if arguments[0] == "inspect" else []
    with open("/dev/full", "w") as full, started([*arguments, *paths], stdout=full) as process:
        _, told = process.communicate(timeout=120)
    assert process.returncode == 2
    assert "No space left" in told
    assert "Traceback" not in told
    assert "Exception ignored" not in told


@pytest.mark.parametrize("arguments", [["inspect", "--tensors"], ["inspect", "--json"]])
def test_a_reader_that_leaves(arguments: list[str], many: Path) -> None:
    with started([*arguments, many], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.stdout.close()
        told = process.stderr.read() if process.stderr is not None else ""
    assert (process.returncode, told) == (2, "")


@pytest.mark.parametrize("buffered", ["", "1"])
def test_a_full_standard_error(buffered: str, many: Path) -> None:
    env = os.environ | {"PYTHONUNBUFFERED": buffered}
    for arguments, code in ((["verify", many / "absent"], 2), (["verify", many], 3), (["frobnicate"], 2)):
        with open("/dev/full", "w") as full:
            command = [sys.executable, "-m", "shardwise", *map(str, arguments)]
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=full, timeout=120, env=env)
        assert done.returncode == code


def test_no_standard_output_at_all(many: Path) -> None:
    command = f"{sys.executable} -m shardwise verify {many} >&-; echo $? >&2"
    done = subprocess.run(["sh", "-c", command], stderr=subprocess.PIPE, text=True, timeout=120)
    assert done.stderr == "3\n"
    command = f"{sys.executable} -m shardwise verify {many}/absent 2>&- ; echo $?"
    done = subprocess.run(["sh", "-c", command], stdout=subprocess.PIPE, text=True, timeout=120)
    assert done.stdout == "2\n"


def test_interrupted_while_it_lists(tmp_path: Path) -> None:
    root = saved(tmp_path).parent
    with started(["ls", "--watch", "60", root], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGINT)
        told = process.stderr.read() if process.stderr is not None else ""
        process.stdout.close()
    assert (process.returncode, told) == (130, "")


@pytest.mark.parametrize("to", ["hf", "dcp", "shards"])
def test_interrupted_while_it_writes(to: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = saved(tmp_path / "root", save_consolidated="false")
    before = sorted(tmp_path.rglob("*"))

    def interrupts(done: int, total: int) -> None:
        raise KeyboardInterrupt

    def bar(quiet: bool) -> contextlib.nullcontext[Progress]:
        return contextlib.nullcontext(interrupts)

    monkeypatch.setattr("shardwise.cli.commands.progress_bar", bar)  # where a signal arrives is left to no chance
    assert main(["convert", str(source), str(tmp_path / "new" / "out"), "--to", to]) == 130
    assert sorted(tmp_path.rglob("*")) == before
    assert main(["consolidate", str(source)]) == 130
    assert sorted(tmp_path.rglob("*")) == before


# --- places that do not let themselves be used ----------------------------------------------------------------------

WRITING = (["inspect", "--html"], ["consolidate", "--output"], ["convert", "--to", "hf"], ["convert", "--to", "shards"])
READING = (["ls"], ["inspect"], ["verify"], ["prune", "--keep-last", "1"], ["repair"])


def writing(arguments: list[str], source: Path, target: Path | str) -> list[str]:
    command, *options = arguments
    return [command, str(source), *([str(target), *options] if command == "convert" else [*options, str(target)])]


@pytest.mark.parametrize("arguments", WRITING)
def test_a_place_that_takes_nothing(arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = saved(tmp_path)
    place = Path("/proc/self/task")  # read-only to root as well
    for target in (place / "out", tmp_path / "LATEST" / "manifest.json" / "out"):
        assert main(writing(arguments, source, target)) == 2
        told = capsys.readouterr().err
        assert str(target.parent) in told or str(target.parent.resolve()) in told
    assert not list(tmp_path.glob("*out*"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read and write everything")
def test_no_permission(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = saved(tmp_path / "root")
    closed = tmp_path / "closed"
    closed.mkdir()
    shutil.copytree(source, closed / "inside")
    for mode in (0o000, 0o500):
        closed.chmod(mode)
        try:
            for arguments in READING if mode == 0 else ():
                assert main([*arguments, str(closed)]) == 2
                assert "Permission denied" in capsys.readouterr().err
            for arguments in WRITING:
                assert main(writing(arguments, source, closed / "out")) == 2
                assert "Permission denied" in capsys.readouterr().err
        finally:
            closed.chmod(0o700)
    assert sorted(path.name for path in closed.iterdir()) == ["inside"]


def test_a_working_directory_that_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = saved(tmp_path / "root")
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    every = [[*arguments, "x"] for arguments in READING]
    every += [writing(arguments, source, "x") for arguments in WRITING]
    every += [writing(arguments, Path("x"), "y") for arguments in WRITING]
    for arguments in [*every, ["diff", "x", str(source)], ["push", "x", "org/name"]]:
        assert main(arguments) == 2, arguments
        assert "the working directory is gone" in capsys.readouterr().err, arguments
    assert main(["verify", str(source)]) == 0
