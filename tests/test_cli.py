"""The command line: exit codes, what is printed, and that asking for help is cheap."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import termios
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tests.ops.checkpoints import saved

from shardwise.cli import main

EXPORT = "model/consolidated/model.safetensors"


def test_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = saved(tmp_path)
    assert main(["verify", str(tmp_path)]) == 0
    printed = capsys.readouterr()
    assert str(directory) in printed.out
    assert "is whole" in printed.out
    assert printed.err == ""
    assert main(["verify", "--quick", str(directory / "model")]) == 0
    assert "digests not" in capsys.readouterr().out


def test_damaged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = saved(tmp_path)
    os.truncate(directory / EXPORT, 1000)
    assert main(["verify", str(directory)]) == 1
    out = capsys.readouterr().out
    assert EXPORT in out
    assert "big" in out
    assert main(["verify", "--json", str(directory)]) == 1
    record = json.loads(capsys.readouterr().out)
    assert record["status"] == "damaged"
    assert record["damages"][0]["file"] == EXPORT
    assert "big" in record["damages"][0]["tensors"]


def test_misuse(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(tmp_path / "nowhere")]) == 2
    assert "nowhere" in capsys.readouterr().err
    for arguments in ([], ["verify"], ["frobnicate"], ["verify", "--threads", "many", str(tmp_path)]):
        with pytest.raises(SystemExit) as left:
            main(arguments)
        assert left.value.code == 2
    assert main(["verify", "--threads", "0", str(tmp_path)]) == 2


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable_is_misuse(tmp_path: Path) -> None:
    directory = tmp_path / "closed"
    directory.mkdir(mode=0)
    assert main(["verify", str(directory)]) == 2


def test_unverifiable(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = saved(tmp_path)
    (directory / "manifest.json").unlink()
    assert main(["verify", str(directory)]) == 3
    assert "cannot be verified" in capsys.readouterr().out


def test_inspect(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved(tmp_path)
    assert main(["inspect", "--tensors", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "model  big  F32 [300, 200]" in out
    assert main(["inspect", "--json", str(tmp_path)]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["step"] == 1
    assert {"big", "small", "empty"} <= {tensor["spec"]["name"] for tensor in record["tensors"]}
    (tmp_path / "LATEST").resolve().joinpath("manifest.json").write_text("{}")
    assert main(["inspect", str(tmp_path)]) == 1


def test_consolidate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = saved(tmp_path, save_consolidated="false")
    assert main(["consolidate", str(directory)]) == 0
    assert (directory / EXPORT).is_file()
    assert main(["consolidate", str(directory)]) == 2
    assert "already there" in capsys.readouterr().err


def test_consolidate_takes_a_root(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = saved(tmp_path, save_consolidated="false")
    assert main(["consolidate", str(tmp_path)]) == 0
    assert (directory / EXPORT).is_file()
    assert str(directory / "model" / "consolidated") in capsys.readouterr().out
    assert main(["verify", str(tmp_path)]) == 0


def test_convert(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = saved(tmp_path / "root", save_consolidated="false")
    out = {to: tmp_path / to for to in ("hf", "dcp", "shards")}
    for to, place in out.items():
        assert main(["convert", str(directory), str(place), "--to", to]) == 0
        assert f"wrote {place}" in capsys.readouterr().out
        assert main(["convert", str(directory), str(place), "--to", to]) == 2
        assert "already" in capsys.readouterr().err
    assert main(["verify", str(out["shards"])]) == 0
    for part in ("model", "optim"):
        assert main(["diff", str(directory / part), str(out["shards"] / directory.name / part)]) == 0
    assert main(["diff", str(directory), str(out["hf"])]) == 0
    capsys.readouterr()
    again = ["convert", str(out["dcp"]), str(tmp_path / "again"), "--to", "shards", "--json", "--step", "7"]
    assert main([*again, "--optimizer"]) == 2
    assert "no optimizer" in capsys.readouterr().err
    assert main(again) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["path"] == str(tmp_path / "again" / "epoch_0_step_7")
    assert (report["format"], report["tensors"], report["optimizer"], report["verified"]) == ("shards", 3, False, False)
    os.truncate(out["dcp"] / "__0_0.distcp", 1000)
    assert main(["convert", str(out["dcp"]), str(tmp_path / "new"), "--to", "hf"]) == 1
    assert main(["convert", str(tmp_path / "nobody"), str(tmp_path / "new"), "--to", "hf"]) == 2
    assert not (tmp_path / "new").exists()
    with pytest.raises(SystemExit) as left:
        main(["convert", str(directory), str(tmp_path / "new")])
    assert left.value.code == 2


@pytest.mark.parametrize("command", ["verify", "inspect", "consolidate"])
def test_an_empty_path_is_not_the_working_directory(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main([command, ""])
    assert left.value.code == 2
    assert "the path is empty" in capsys.readouterr().err


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "shardwise", *arguments], capture_output=True, text=True, timeout=120)


def test_as_a_module(tmp_path: Path) -> None:
    saved(tmp_path)
    done = run("verify", str(tmp_path))
    assert (done.returncode, done.stderr) == (0, "")
    assert "is whole" in done.stdout


def test_neither_help_nor_verify_load_torch(tmp_path: Path) -> None:
    saved(tmp_path)
    code = (
        "import sys; from shardwise.cli import main\n"
        f"status = main(['verify', {str(tmp_path)!r}])\n"
        "heavy = [name for name in ('torch', 'numpy', 'transformers', 'huggingface_hub') if name in sys.modules]\n"
        "print(heavy, file=sys.stderr); sys.exit(status)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr.strip()) == (0, "[]")


def test_ls(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved(tmp_path, (1, 2))
    assert main(["ls", str(tmp_path)]) == 0
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.split()[:2] == ["STEP", "EPOCH"]
    assert [line.split()[0] for line in lines] == ["1", "2"]
    assert "LATEST" in lines[1]
    assert "\033" not in "".join(lines)
    os.truncate(tmp_path / "epoch_0_step_1" / EXPORT, 1000)
    assert main(["ls", "--json", str(tmp_path)]) == 1
    assert [each["state"] for each in json.loads(capsys.readouterr().out)] == ["damaged", "published"]
    assert main(["ls", str(tmp_path / "LATEST")]) == 2


def test_several_paths_are_all_looked_at(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = saved(tmp_path)
    paths = [str(tmp_path / "nowhere"), str(directory)]
    assert main(["verify", "--json", *paths]) == 2
    first, second = json.loads(capsys.readouterr().out)
    assert (first["requested"], second["status"]) == (paths[0], "whole")
    os.truncate(directory / EXPORT, 1000)
    assert main(["verify", "--quiet", *paths]) == 1
    assert capsys.readouterr().out.startswith("DAMAGED")


@pytest.mark.parametrize(("typed", "meant"), [(["verfiy", "x"], "verify"), (["verify", "--quik", "x"], "--quick")])
def test_what_was_meant(typed: list[str], meant: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(typed)
    assert left.value.code == 2
    assert f"Did you mean {meant}?" in capsys.readouterr().err


@pytest.mark.parametrize(
    "call",
    [
        *("ls PATH", "repair PATH", "prune PATH", "verify PATH", "inspect PATH", "consolidate PATH", "diff TOP PATH"),
        *("diff PATH TOP", "convert PATH TOP/out --to hf", "push PATH org/name"),
        *("merge-adapter PATH TOP TOP/out", "merge-adapter TOP PATH TOP/out"),
    ],
)
def test_a_mistyped_path_names_the_one_beside_it(call: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "checkpoints"
    saved(root)

    def told(path: Path) -> str:
        places = {"PATH": str(path), "TOP": str(root)}
        assert main([places.get(word, word.replace("TOP", str(tmp_path))) for word in call.split()]) == 2
        return capsys.readouterr().err

    for wrong in (tmp_path / "chekpoints", tmp_path / "chekpoints" / "LATEST"):
        meant = root / wrong.relative_to(tmp_path / "chekpoints")
        assert f"there is nothing at this path [path {str(wrong)!r}] Did you mean {str(meant)!r}?" in told(wrong)
    assert "Did you mean" not in told(tmp_path / "else")
    there = told(root / "epoch_0_step_7")
    assert f"There is nothing called epoch_0_step_7 in {root}. It has the checkpoints epoch_0_step_1." in there


def test_what_others_saved_is_no_root_and_that_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for step in (5, 10):
        (tmp_path / "out" / f"checkpoint-{step}").mkdir(parents=True)
        save_file({"w": torch.ones(2)}, tmp_path / "out" / f"checkpoint-{step}" / "model.safetensors")
    before = sorted(tmp_path.rglob("*"))
    nearest = f"What another tool saved is in {tmp_path / 'out' / 'checkpoint-10'}, {tmp_path / 'out' / 'checkpoint-5'}"
    for arguments in (["ls"], ["repair"], ["repair", "--yes"], ["prune", "--keep-last", "1", "--yes"]):
        assert main([*arguments, str(tmp_path / "out")]) == 0
        out = capsys.readouterr().out
        assert "holds no checkpoints, which are directories called epoch_E_step_S" in out
        assert nearest in out
        assert main([*arguments, str(tmp_path / "out" / "checkpoint-5")]) == 0
        assert "a model's directory" in capsys.readouterr().out
    assert sorted(tmp_path.rglob("*")) == before


def test_roots_below(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved(tmp_path / "runs" / "a", (1, 2))
    saved(tmp_path / "runs" / "b")
    (tmp_path / "runs" / "config.json").write_text("{}")
    assert main(["ls", str(tmp_path / "runs")]) == 0
    assert f"There are checkpoints in {tmp_path / 'runs' / 'a'}, {tmp_path / 'runs' / 'b'}" in capsys.readouterr().out
    for command in ("verify", "inspect", "consolidate"):
        assert main([command, str(tmp_path / "runs")]) == 2
        told = capsys.readouterr().err
        assert "this is no checkpoint; there are some in" in told
        assert str(tmp_path / "runs" / "b") in told
    assert main(["verify", str(tmp_path / "runs" / "a")]) == 0


def test_a_working_directory_that_is_gone_is_misuse(tmp_path: Path) -> None:
    code = (
        "import os, sys; os.chdir(sys.argv[1]); os.rmdir(sys.argv[1]); from shardwise.cli import main; "
        "sys.exit(main(['ls', 'x']))"
    )
    gone = tmp_path / "gone"
    gone.mkdir()
    done = subprocess.run([sys.executable, "-c", code, str(gone)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "No such file or directory" in done.stderr


def test_an_error_of_the_program_is_no_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("shardwise.ops.listing.list_checkpoints", broken)
    assert main(["ls", str(tmp_path)]) == 70
    assert "ZeroDivisionError" in capsys.readouterr().err


def test_an_empty_directory_is_misuse(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(tmp_path)]) == 2
    assert "the directory holds no file" in capsys.readouterr().err


def test_names_that_are_no_text_are_printed(tmp_path: Path) -> None:
    directory = os.fsencode(tmp_path) + b"/run\xff"
    os.mkdir(directory)
    with open(directory + b"/a\xfe.json", "w") as file:
        file.write("{}")
    command = [sys.executable, "-m", "shardwise", "inspect", directory]
    strict = os.environ | {"PYTHONIOENCODING": "utf-8:strict"}
    done = subprocess.run(command, capture_output=True, timeout=120, env=strict)
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"a\\udcfe.json" in done.stdout
    command += ["--html", os.fsencode(tmp_path) + b"/page.html"]
    assert subprocess.run(command, capture_output=True, timeout=120, env=strict).returncode == 0


def test_ls_says_who_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved(tmp_path)
    (tmp_path / ".saving-epoch_0_step_5").mkdir()
    (tmp_path / ".owner-epoch_0_step_5").write_text("another-machine 17 token\n")
    assert main(["ls", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "claimed" in out
    assert "process 17 on another-machine" in out
    for wrong in (["--watch", "0"], ["--watch", "--json"]):
        assert main(["ls", str(tmp_path), *wrong]) == 2
        assert "--watch takes a number of seconds above 0" in capsys.readouterr().err


def test_diff_prints_json_and_nothing_but_differences(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, value in (("a", 1.0), ("b", 2.0)):
        save_file({"w": torch.full((3,), value), "same": torch.ones(2)}, tmp_path / f"{name}.safetensors")
    files = [str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors")]
    assert main(["diff", "--json", *files]) == 1
    report = json.loads(capsys.readouterr().out)
    assert (report["differs"], report["tensors"][0]["relative"]) == (True, 1.0)
    assert main(["diff", "--quiet", *files]) == 1
    assert len(capsys.readouterr().out.splitlines()) == 1
    assert main(["diff", "--digests", *files]) == 3
    assert "? model  w  no digests in common: not compared" in capsys.readouterr().out


def test_verify_names_what_is_beside(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = saved(tmp_path)
    (path / "README.md").write_text("a note")
    assert main(["verify", str(path)]) == 0
    assert "extra    README.md" in capsys.readouterr().out.splitlines()


def test_a_progress_bar_on_a_terminal(tmp_path: Path) -> None:
    root = saved(tmp_path / "root").parent
    ours, theirs = os.openpty()
    termios.tcsetwinsize(theirs, (25, 80))
    command = [sys.executable, "-m", "shardwise", "verify", str(root)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=theirs, text=True, timeout=120)
    shown = os.read(ours, 100_000)
    os.close(theirs)
    os.close(ours)
    assert done.returncode == 0
    assert b"B/s" in shown
