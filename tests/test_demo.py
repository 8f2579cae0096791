"""The demo: its pure parts, and the whole story on a tiny model with real processes."""

from __future__ import annotations

import io
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from examples.finetune import events, texts
from examples.finetune.__main__ import main, parser
from examples.finetune.base_model import prepare_base
from examples.finetune.console import Console, megabytes
from examples.finetune.errors import DemoError
from examples.finetune.inspection import look_at_remains, unfinished
from examples.finetune.last_look import look
from examples.finetune.raw_write import local_tensors, raw_write
from examples.finetune.report import Check, RunRecord, Written, check_lines, run_lines, same, speed_lines, written_lines
from examples.finetune.task import Task
from tests.ops.checkpoints import saved
from tests.support.ranks import fresh

EVENTS: tuple[events.Event, ...] = (
    events.Started(1, 4242),
    events.Ready(2, 1000, 2000, 1.5),
    events.Resumed(3, "epoch_0_step_3", 2, 0.25),
    events.Stepped(4, 2.5, 0.125),
    events.Saving(4),
    events.Saved(4, "epoch_0_step_4", 2.0, 1.0, 3000),
    events.Finished(2.25),
)


@pytest.fixture
def tiny_model(tmp_path: Path) -> Path:
    """A random Llama of 50 kB with a tokenizer of words, as a Hugging Face directory."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = sorted({word for text in texts.SENTENCES for word in text.replace(",", " ,").replace(".", " .").split()})
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, **{word: i for i, word in enumerate(words, 1)}}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    directory = tmp_path / "tiny"
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(directory)
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=len(words) + 1,
        tie_word_embeddings=True,
        eos_token_id=None,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(directory)
    return directory


class TestEvents:
    def test_follower_reads_each_event_once(self, tmp_path: Path) -> None:
        follower = events.Follower(tmp_path / "events")
        assert follower.read() == []
        for event in EVENTS[:3]:
            events.append(tmp_path / "events", event)
        assert follower.read() == list(EVENTS[:3])
        for event in EVENTS[3:]:
            events.append(tmp_path / "events", event)
        assert follower.read() == list(EVENTS[3:])
        assert follower.read() == []

    def test_half_a_line_waits(self, tmp_path: Path) -> None:
        path = tmp_path / "events"
        line = events.encode(EVENTS[0])
        path.write_bytes(line + line[:7])
        follower = events.Follower(path)
        assert follower.read() == [EVENTS[0]]
        with path.open("ab") as file:
            file.write(line[7:])
        assert follower.read() == [EVENTS[0]]

    def test_task_round_trip(self, tmp_path: Path) -> None:
        task = Task(tmp_path / "b", tmp_path / "c", tmp_path / "s", tmp_path / "e", 8, 6, 1e-4, 17)
        task.write(tmp_path / "task.json")
        assert Task.read(tmp_path / "task.json") == task


class TestTexts:
    @pytest.mark.parametrize("world_size", [1, 2, 3, 6])
    def test_shares_are_equal_and_complete(self, world_size: int) -> None:
        blocks = texts.make_blocks(range(1000))
        shares = [texts.share(blocks, rank, world_size) for rank in range(world_size)]
        assert {len(part) for part in shares} == {texts.BLOCKS // world_size}
        assert sorted(block for part in shares for block in part) == sorted(blocks)

    def test_unequal_shares_are_refused(self) -> None:
        with pytest.raises(ValueError, match="6 blocks"):
            texts.share(texts.make_blocks(range(1000)), 0, 4)

    def test_short_texts_start_again(self) -> None:
        assert texts.make_blocks([1, 2, 3], count=2, length=4) == [[1, 2, 3, 1], [2, 3, 1, 2]]

    def test_no_tokens(self) -> None:
        with pytest.raises(ValueError, match="no tokens"):
            texts.make_blocks([])


class TestReport:
    def test_ratio_is_of_medians(self) -> None:
        saves = [
            events.Saved(i, f"epoch_0_step_{i}", s, raw, 1_000_000) for i, s, raw in ((1, 9, 1), (2, 3, 2), (3, 2, 4))
        ]
        lines = speed_lines([RunRecord(2, saves=saves), RunRecord(3)], 6_000_000)
        assert len(lines) == 3
        assert lines[2].split() == ["2", "processes", "3", "3.00", "s", "2.0", "MB/s", "1.0", "MB", "2.00", "s", "1.50"]

    def test_runs(self) -> None:
        killed = RunRecord(2, steps=[events.Stepped(1, 3.0, 1.0), events.Stepped(2, 2.5, 1.0)], killed_in=2)
        resumed = RunRecord(
            3, resumed=events.Resumed(1, "epoch_0_step_1", 2, 0.5), steps=[events.Stepped(2, 2.5, 1.0)], final_loss=2.0
        )
        lines = run_lines([killed, resumed])
        assert "base model" in lines[2]
        assert "SIGKILL while saving step 2" in lines[2]
        assert "epoch_0_step_1" in lines[3]
        assert "2 processes" in lines[3]
        assert lines[3].endswith("finished")

    def test_written_adds_up(self) -> None:
        assert written_lines([Written("optim", 2, 1_500_000), Written("rng", 1, 500_000)])[-1].split() == [
            *("together", "3", "2.0", "MB")
        ]

    def test_failed_checks_stand_out(self) -> None:
        assert check_lines([Check(True, "a"), Check(False, "b")]) == ["ok      a", "FAILED  b"]

    def test_same(self) -> None:
        assert same(2.0, 2.001, 0.01)
        assert not same(2.0, 2.1, 0.01)

    def test_megabytes(self) -> None:
        assert megabytes(807_234_567) == "807.2 MB"
        assert megabytes(2_500) == "2.5 kB"


def test_raw_write_holds_every_byte(tmp_path: Path) -> None:
    model = torch.nn.Linear(8, 4).to(torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 8, dtype=torch.bfloat16)).sum().backward()
    optimizer.step()
    tensors = list(local_tensors(model, optimizer))
    for _ in range(2):
        nbytes = raw_write(tensors, tmp_path / "raw")
    assert nbytes == 3 * 2 * (8 * 4 + 4) + 2 * 4
    assert (tmp_path / "raw").read_bytes()[: 8 * 4 * 2] == model.weight.detach().view(torch.uint8).numpy().tobytes()
    assert [path.name for path in tmp_path.iterdir()] == ["raw"]


class TestRemains:
    def test_nothing(self, tmp_path: Path) -> None:
        assert look_at_remains(tmp_path / "absent") is None

    def test_unfinished_save(self, tmp_path: Path) -> None:
        for name in ("epoch_0_step_1", ".saving-epoch_0_step_2"):
            (tmp_path / name / "model").mkdir(parents=True)
            (tmp_path / name / "model" / "model.safetensors").write_bytes(b"12345")
        assert [path.name for path in unfinished(tmp_path)] == [".saving-epoch_0_step_2"]
        found = look_at_remains(tmp_path)
        assert found is not None
        assert (found.files, found.nbytes, found.refused) == (1, 5, True)
        assert (found.published, found.latest) == (("epoch_0_step_1",), "epoch_0_step_1")


class TestLastLook:
    @pytest.mark.slow
    def test_commands_are_run_and_shown(self, tmp_path: Path) -> None:
        saved(tmp_path / "run", (1, 2))
        ls, diff, inspect = look(tmp_path / "run", tmp_path / "page.html")
        assert [ran.ok for ran in (ls, inspect)] == [True, True]
        assert not diff.ok  # nothing was trained: the models are equal
        assert diff.command.split()[1:] == [
            "diff",
            *(str(tmp_path / "run" / f"epoch_0_step_{n}" / "model") for n in (1, 2)),
        ]
        assert "LATEST" in ls.lines[-1]
        assert (tmp_path / "page.html").is_file()

    def test_one_checkpoint_cannot_be_compared(self, tmp_path: Path) -> None:
        saved(tmp_path)
        *_, last = look(tmp_path, tmp_path / "page.html")
        assert not last.ok


class TestModelChoice:
    def test_absent_directory(self, tmp_path: Path) -> None:
        with pytest.raises(DemoError, match="no such directory"):
            prepare_base(str(tmp_path / "absent"), tmp_path / "out", Console(io.StringIO()))

    def test_directory_without_model(self, tmp_path: Path) -> None:
        with pytest.raises(DemoError, match=r"config\.json"):
            prepare_base(str(tmp_path), tmp_path / "out", Console(io.StringIO()))

    def test_safetensors_directory_is_used_where_it_is(self, tiny_model: Path, tmp_path: Path) -> None:
        base = prepare_base(str(tiny_model), tmp_path / "out", Console(io.StringIO()))
        assert base.directory == tiny_model
        assert base.weight_bytes == (tiny_model / "model.safetensors").stat().st_size

    def test_too_few_steps(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit):
            parser().parse_args(["--steps", "3"])
        assert "at least 4" in capsys.readouterr().err

    def test_full_out_directory_is_left_alone(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (tmp_path / "precious").write_text("x")
        assert main(["--out", str(tmp_path)]) == 1
        assert "not empty" in capsys.readouterr().err
        assert (tmp_path / "precious").read_text() == "x"


def demo(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "examples.finetune", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_whole_story(tiny_model: Path, tmp_path: Path) -> None:
    with demo("--model", str(tiny_model), "--steps", "6", "--out", str(tmp_path / "out")) as process:
        text, _ = process.communicate(timeout=800)
    assert process.returncode == 0, text
    assert "every check passed" in text
    assert "SIGKILL while saving step" in text
    root = tmp_path / "out" / "checkpoints"
    assert (root / "LATEST").resolve().name == "epoch_0_step_6"
    ending = text[text.index("== $ shardwise ls") :]
    steps = [line.split()[0] for line in ending.split("== $ shardwise diff")[0].splitlines() if "published" in line]
    assert steps[-2:] == ["5", "6"]
    assert f"diff {root}/epoch_0_step_5/model {root}/epoch_0_step_6/model" in ending
    assert "relative difference at most" in ending
    page = tmp_path / "out" / "report.html"
    assert f"what its last step changed: {page}" in ending
    assert "epoch_0_step_5" in page.read_text()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_no_worker_outlives_a_killed_demo(tiny_model: Path, tmp_path: Path) -> None:
    with demo("--model", str(tiny_model), "--out", str(tmp_path / "out")) as process:
        follower = events.Follower(tmp_path / "out" / "run-1" / "events.jsonl")
        pids: list[int] = []
        while len(pids) < 2 and process.poll() is None:
            pids += [event.pid for event in follower.read() if isinstance(event, events.Started)]
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
    assert len(pids) == 2
    limit = time.monotonic() + 60
    while any(_runs(pid) for pid in pids):
        assert time.monotonic() < limit, "workers are still there"
        time.sleep(0.1)


def _runs(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def _example(directory: Path) -> None:
    os.chdir(directory)
    runpy.run_path("example.py", run_name="__main__")


@pytest.mark.timeout(900)
def test_readme_example_runs_twice(tmp_path: Path) -> None:
    readme = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    code = readme.split("```python\n")[1].split("```")[0]
    (tmp_path / "example.py").write_text(code, encoding="utf-8")
    done = subprocess.run([sys.executable, "example.py"], cwd=tmp_path, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    # Again, where everything is imported already.
    output = tmp_path / "output"
    assert fresh(_example, tmp_path, output=output, seconds=400) == 0, (tmp_path / "output.err").read_text()
    assert os.readlink(tmp_path / "checkpoints" / "LATEST") == "epoch_0_step_2"
