"""Completion scripts, completed by the shells themselves."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from shardwise.cli import main
from shardwise.cli.completion import SHELLS
from shardwise.cli.parsing import make_parser

COMMANDS = list(make_parser().commands)


@pytest.fixture
def scripts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """A folder with the script of each shell, and some files to be completed."""
    for shell in SHELLS:
        assert main(["completion", shell]) == 0
        (tmp_path / f"script.{shell}").write_text(capsys.readouterr().out)
    (tmp_path / "run one").mkdir()
    (tmp_path / "report.html").touch()
    return tmp_path


def run(folder: Path, *command: str) -> list[str]:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout.splitlines()


def bash(folder: Path, *typed: str) -> list[str]:
    """What bash offers for a line whose last word is being typed."""
    code = (
        "source script.bash; complete -p shardwise >/dev/null || exit 1; "
        'COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _shardwise; printf "%s\\n" "${COMPREPLY[@]}"'
    )
    return [line for line in run(folder, "bash", "-c", code, "bash", "shardwise", *typed) if line]


@pytest.mark.parametrize("shell", SHELLS)
def test_a_shell_can_read_its_script(shell: str, scripts: Path) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    run(scripts, shell, "-n", f"script.{shell}")


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
def test_bash_completes(scripts: Path) -> None:
    assert bash(scripts, "") == COMMANDS
    assert bash(scripts, "ins") == ["inspect"]
    assert bash(scripts, "--v") == ["--version"]
    assert bash(scripts, "inspect", "--a") == ["--against"]
    assert bash(scripts, "inspect", "r") == ["run one", "report.html"] or bash(scripts, "inspect", "r") == [
        "report.html",
        "run one",
    ]
    assert bash(scripts, "inspect", "--html", "rep") == ["report.html"]
    assert bash(scripts, "prune", "run one", "--metric-mode", "") == ["min", "max"]
    assert bash(scripts, "prune", "--keep-last", "") == []
    assert bash(scripts, "completion", "z") == ["zsh"]
    assert "--yes" in bash(scripts, "repair", "--")
    assert "--yes" not in bash(scripts, "ls", "--")


@pytest.mark.skipif(shutil.which("fish") is None, reason="fish is not installed")
def test_fish_completes(scripts: Path) -> None:
    def fish(line: str) -> list[str]:
        found = run(scripts, "fish", "--no-config", "-c", f"source script.fish; complete -C {line!r}")
        return [each.split("\t")[0] for each in found]

    assert sorted(fish("shardwise ")) == sorted(COMMANDS)
    assert fish("shardwise ins") == ["inspect"]
    assert fish("shardwise inspect --ag") == ["--against"]
    assert fish("shardwise prune --metric-mode ") == ["max", "min"]
    assert fish("shardwise inspect --html rep") == ["report.html"]
    assert fish("shardwise completion b") == ["bash"]


def test_every_command_and_option_is_in_every_script(scripts: Path) -> None:
    for shell in SHELLS:
        script = (scripts / f"script.{shell}").read_text()
        for name, command in make_parser().commands.items():
            assert name in script
            for flag in (flag for argument in command.arguments for flag in argument.option_strings):
                assert (f" -l {flag[2:]} " if shell == "fish" and flag.startswith("--") else flag[2:]) in script
