"""The command line: exit codes, what is printed, and that asking for help is cheap."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
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


def test_ls_of_what_holds_roots_names_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved(tmp_path / "last.ckpt", (1,))
    (tmp_path / "logs").mkdir()
    assert main(["ls", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{tmp_path} holds no checkpoints; directories in it do: last.ckpt\n"
    (tmp_path / "last.ckpt" / "epoch_0_step_1").rename(tmp_path / "mine")  # a checkpoint, and no root
    assert main(["ls", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{tmp_path} holds no checkpoints\n"


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


@pytest.mark.parametrize("command", ["ls", "repair", "prune"])
def test_a_mistyped_root_names_the_one_beside_it(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "checkpoints").mkdir()
    assert main([command, str(tmp_path / "chekpoints")]) == 2
    assert f"Did you mean {str(tmp_path / 'checkpoints')!r}?" in capsys.readouterr().err
    assert main([command, str(tmp_path / "else")]) == 2
    assert "Did you mean" not in capsys.readouterr().err


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
    assert "there is nothing to verify" in capsys.readouterr().err


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
