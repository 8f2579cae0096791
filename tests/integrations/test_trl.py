"""TRL's trainers with shardwise's checkpoints. No environment of this repository has TRL: it is skipped there."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from tests.integrations.runs import die_when_opening, digest, model
from tests.support.ranks import fresh

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="TRL is not installed: pip install trl"),
]

WORDS = [f"w{number}" for number in range(100)]


def tokenizer() -> Any:
    """Words are tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    table = {word: number for number, word in enumerate(["<pad>", "<unk>", "</s>", *WORDS])}
    made = Tokenizer(models.WordLevel(table, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", unk_token="<unk>", eos_token="</s>")


def sentence(number: int, words: int = 8) -> str:
    return " ".join(WORDS[(number * 7 + place * 3) % 100] for place in range(words))


def different_words(completions: list[str], **others: object) -> list[float]:
    """A reward for `GRPOTrainer`."""
    return [float(len(set(completion.split()))) for completion in completions]


def build(kind: str, directory: Path, is_async: bool) -> Any:
    """A trainer of TRL's, in front of `ShardwiseTrainer`."""
    import trl
    from datasets import Dataset

    from shardwise import CheckpointingConfig
    from shardwise.integrations.transformers import ShardwiseTrainer

    checkpointing = CheckpointingConfig(is_async=is_async, save_consolidated="every")
    host, settings = getattr(trl, f"{kind}Trainer"), getattr(trl, f"{kind}Config")
    cls = type(f"Checkpointed{kind}", (host, ShardwiseTrainer), {"checkpointing": checkpointing})
    rows = {
        "SFT": [{"text": sentence(number)} for number in range(32)],
        "DPO": [
            {"prompt": sentence(n, 3), "chosen": " " + sentence(n + 1, 4), "rejected": " " + sentence(n + 2, 4)}
            for n in range(32)
        ],
        "GRPO": [{"prompt": sentence(number, 3)} for number in range(32)],
    }[kind]
    own: dict[str, Any] = {"num_generations": 2, "max_completion_length": 6} if kind == "GRPO" else {}
    args = settings(
        output_dir=str(directory),
        learning_rate=2e-3,
        per_device_train_batch_size=4,
        max_steps=12,
        save_steps=3,
        save_total_limit=2,
        logging_steps=1,
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        report_to="none",
        **own,
    )
    rewards: dict[str, Any] = {"reward_funcs": different_words} if kind == "GRPO" else {}
    trained, data = model(lora=kind == "DPO"), Dataset.from_list(rows)
    return cls(model=trained, args=args, train_dataset=data, processing_class=tokenizer(), **rewards)


def train(kind: str, directory: Path, is_async: bool, killed_in: str) -> None:
    from shardwise.integrations.transformers import get_last_checkpoint

    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    if killed_in:
        die_when_opening(f".saving-{killed_in}/model/")
    trainer = build(kind, directory, is_async)
    trainer.train(resume_from_checkpoint=get_last_checkpoint(directory))
    trainer.save_model()
    losses = {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry}
    rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    print(json.dumps({"losses": losses, "rewards": rewards, "weights": digest(trainer.model)}))


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("kind", ["SFT", "DPO", "GRPO"])
def test_killed_in_a_save_and_resumed(kind: str, is_async: bool, tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    said = [tmp_path / name for name in ("whole", "killed", "resumed")]
    for output, directory, killed_in in zip(said, ("a", "b", "b"), ("", "epoch_0_step_6", ""), strict=True):
        code = fresh(train, kind, tmp_path / directory, is_async, killed_in, output=output, seconds=280)
        errors = output.with_name(output.name + ".err").read_text()[-3000:]
        assert code == (-signal.SIGKILL if killed_in else 0), errors
    whole, resumed = (json.loads(said[number].read_text().splitlines()[-1]) for number in (0, 2))
    assert resumed == whole
    assert len(resumed["losses"]) == 12
    assert len(set(resumed["rewards"])) > 1 or kind != "GRPO"
    newest = tmp_path / "b" / "LATEST"
    assert (newest / "trainer_state.json").is_file()
    assert (tmp_path / "b" / "README.md").is_file()  # TRL's model card
    if kind != "DPO":
        LlamaForCausalLM.from_pretrained(tmp_path / "b")
        assert (newest / "model" / "consolidated" / "tokenizer.json").is_file()
    else:
        assert (tmp_path / "b" / "adapter_model.safetensors").is_file()
