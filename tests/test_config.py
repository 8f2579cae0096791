from __future__ import annotations

import copy
import dataclasses
import inspect
import logging
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from shardwise import config as config_module
from shardwise.config import CheckpointingConfig, SaveConsolidatedMode
from shardwise.errors import ConfigError

NAMES = [field.name for field in dataclasses.fields(CheckpointingConfig)]


def test_fields_keep_the_documented_order() -> None:
    assert NAMES[:17] == [
        "enabled",
        "checkpoint_dir",
        "model_save_format",
        "model_cache_dir",
        "model_repo_id",
        "save_consolidated",
        "is_peft",
        "model_state_dict_keys",
        "is_async",
        "dequantize_base_checkpoint",
        "original_model_root_dir",
        "skip_task_head_prefixes_for_base_model",
        "single_rank_consolidation",
        "staging_dir",
        "v4_compatible",
        "diffusers_compatible",
        "best_metric_key",
    ]
    assert NAMES[17:23] == [
        "wait_for_staging",
        "cpu_offload",
        "allow_legacy_pickle_restore",
        "legacy_paramwrapper_layout",
        "consolidation_timeout_minutes",
        "max_recent_checkpoints",
    ]


def test_every_field_has_its_reason_in_the_docstring() -> None:
    text = CheckpointingConfig.__doc__ or ""
    assert [name for name in NAMES if f"        {name}: " not in text] == []


def test_the_public_names() -> None:
    assert config_module.__all__ == ["CheckpointingConfig", "SaveConsolidatedMode"]


def test_the_cache_falls_back_to_the_hub_cache(tmp_path: Path) -> None:
    from huggingface_hub.constants import HF_HUB_CACHE

    assert CheckpointingConfig().model_cache_dir == HF_HUB_CACHE
    assert CheckpointingConfig(model_cache_dir=tmp_path).model_cache_dir == tmp_path


@pytest.mark.parametrize(
    ("given_mode", "mode"),
    [
        (True, SaveConsolidatedMode.EVERY),
        (False, SaveConsolidatedMode.FALSE),
        ("false", SaveConsolidatedMode.FALSE),
        ("final", SaveConsolidatedMode.FINAL),
        ("every", SaveConsolidatedMode.EVERY),
        ("EVERY", SaveConsolidatedMode.EVERY),
        (" Final ", SaveConsolidatedMode.FINAL),
        ("True", SaveConsolidatedMode.EVERY),
        ("off", SaveConsolidatedMode.FALSE),
        (SaveConsolidatedMode.FINAL, SaveConsolidatedMode.FINAL),
    ],
)
def test_modes_and_their_aliases(given_mode: bool | str | SaveConsolidatedMode, mode: SaveConsolidatedMode) -> None:
    config = CheckpointingConfig(save_consolidated=given_mode)
    assert config.save_consolidated is mode
    assert config.consolidated_mode is mode


def test_the_mode_has_the_documented_values() -> None:
    assert {mode.name: mode.value for mode in SaveConsolidatedMode} == {
        "FALSE": "false",
        "FINAL": "final",
        "EVERY": "every",
    }


@pytest.mark.parametrize("wrong", ["sometimes", "", 1, 0, None, 2.5])
def test_other_modes_are_refused(wrong: object) -> None:
    with pytest.raises(ConfigError, match="'final'"):
        CheckpointingConfig(save_consolidated=wrong)  # type: ignore[arg-type]


def test_when_a_save_exports() -> None:
    def exports(**settings: object) -> tuple[bool, bool]:
        config = CheckpointingConfig(**settings)  # type: ignore[arg-type]
        return config.exports(is_final_checkpoint=False), config.exports(is_final_checkpoint=True)

    assert exports() == (False, True)
    assert exports(save_consolidated="every") == (True, True)
    assert exports(save_consolidated="false") == (False, False)
    assert exports(save_consolidated="every", model_save_format="torch_save") == (False, False)
    assert exports(save_consolidated="every", is_peft=True) == (False, False)


@pytest.mark.parametrize("wrong", ["pickle", "", None, 3])
def test_an_unknown_save_format(wrong: object) -> None:
    with pytest.raises(ValueError, match="Unsupported model save format") as caught:
        CheckpointingConfig(model_save_format=wrong)  # type: ignore[arg-type]
    assert isinstance(caught.value, ConfigError)
    assert "'safetensors'" in str(caught.value)


def test_the_save_format_in_any_case() -> None:
    assert CheckpointingConfig(model_save_format="Torch_Save").model_save_format == "torch_save"


@pytest.mark.parametrize("wrong", ["sometimes", "", None, True])
def test_an_unknown_way_of_sharing_reads(wrong: object) -> None:
    with pytest.raises(ConfigError, match="Unsupported share_replica_reads") as caught:
        CheckpointingConfig(share_replica_reads=wrong)  # type: ignore[arg-type]
    assert "'auto' or 'always' or 'never'" in str(caught.value)
    assert CheckpointingConfig(share_replica_reads=" Always ").share_replica_reads == "always"
    assert CheckpointingConfig.from_dict({}).share_replica_reads == "auto"


def test_adapters_are_safetensors_and_it_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    settings = {"save_consolidated": "every", "single_rank_consolidation": True, "max_recent_checkpoints": 4}
    with caplog.at_level(logging.WARNING):
        config = CheckpointingConfig(is_peft=True, model_save_format="torch_save", **settings)  # type: ignore[arg-type]
    assert config.model_save_format == "safetensors"
    assert config.save_consolidated is SaveConsolidatedMode.FINAL
    assert [record.name for record in caplog.records] == ["shardwise.config"]
    same = CheckpointingConfig(is_peft=True, **(settings | {"save_consolidated": "final"}))  # type: ignore[arg-type]
    assert config == same


def test_adapters_as_safetensors_keep_their_mode(caplog: pytest.LogCaptureFixture) -> None:
    assert CheckpointingConfig(is_peft=True, save_consolidated="every").save_consolidated is SaveConsolidatedMode.EVERY
    assert caplog.records == []


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *[("allow_legacy_pickle_restore", value) for value in ("true", 1, 0, None)],
        *[("consolidation_timeout_minutes", value) for value in (0, -1, True, "30", float("nan"), float("inf"))],
        *[("collective_timeout_seconds", value) for value in (0, -0.5, False, None)],
        *[("max_recent_checkpoints", value) for value in (0, -1, True, False, 1.0, "3")],
        *[("max_file_bytes", value) for value in (0, -1, True, None)],
        *[("io_threads", value) for value in (0, True)],
        *[("best_metric_mode", value) for value in ("lowest", None)],
        ("checkpoint_dir", ""),
    ],
)
def test_values_that_cannot_work(key: str, value: object) -> None:
    with pytest.raises(ConfigError, match=key) as caught:
        CheckpointingConfig(**{key: value})  # type: ignore[arg-type]
    assert caught.value.hint


def test_keeping_more_than_everything_is_refused() -> None:
    for key in ("keep_best", "keep_every_k_steps"):
        with pytest.raises(ConfigError, match=f"{key} has no effect.*max_recent_checkpoints"):
            CheckpointingConfig(**{key: 2})  # type: ignore[arg-type]
        assert getattr(CheckpointingConfig(max_recent_checkpoints=1, **{key: 2}), key) == 2  # type: ignore[arg-type]


REMOTE = ["s3://bucket/run", "gs://bucket", "msc://profile/run", Path("s3://bucket/run")]


@pytest.mark.parametrize("directory", REMOTE)
def test_a_remote_directory_says_what_to_set_instead(directory: str | Path) -> None:
    for mode in ("final", "every", True):
        with pytest.raises(ConfigError, match="save_consolidated to 'false'"):
            CheckpointingConfig(checkpoint_dir=directory, save_consolidated=mode)
    with pytest.raises(ConfigError, match="max_recent_checkpoints out"):
        CheckpointingConfig(checkpoint_dir=directory, save_consolidated=False, max_recent_checkpoints=3)
    config = CheckpointingConfig(checkpoint_dir=directory, save_consolidated=False)
    assert config.is_remote
    assert config.checkpoint_dir == directory


@pytest.mark.parametrize("directory", ["checkpoints/", "/data/a:b//c", "./s3:/x", Path("C:/runs"), "a//b", "s3:/one"])
def test_local_directories_are_local(directory: str | Path) -> None:
    assert not CheckpointingConfig(checkpoint_dir=directory, max_recent_checkpoints=1).is_remote


def test_asynchronous_saving_needs_a_recent_torch(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert CheckpointingConfig(is_async=True).is_async
    assert not caplog.records
    monkeypatch.setattr(torch, "__version__", "2.8.1+cpu")
    assert CheckpointingConfig(is_async=True).is_async is False
    [warning] = caplog.records
    assert "torch 2.9 or newer" in warning.message
    assert not config_module._is_geq_torch_2_9()
    monkeypatch.setattr(torch, "__version__", "2.10.0")
    assert config_module._is_geq_torch_2_9()


def test_a_block_may_be_passed_as_keywords() -> None:
    block = {"enabled": True, "save_consolidated": "every", "max_recent_checkpoints": 3}
    assert CheckpointingConfig(**block) == CheckpointingConfig.from_dict(block)
    misspelt = {"save_consolidate": "every"}
    with pytest.raises(ConfigError, match="'save_consolidate'.*Did you mean 'save_consolidated'") as caught:
        CheckpointingConfig(**misspelt)
    assert isinstance(caught.value, TypeError)
    with pytest.raises(TypeError, match="positional"):
        CheckpointingConfig(*range(100))
    assert list(inspect.signature(CheckpointingConfig).parameters) == NAMES
    assert dataclasses.replace(CheckpointingConfig(), enabled=False) == CheckpointingConfig(enabled=False)
    assert copy.deepcopy(CheckpointingConfig()) == CheckpointingConfig()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("enabled", "no"),
        ("is_async", "false"),
        ("is_peft", 1),
        ("verify_export", None),
        ("dequantize_base_checkpoint", "auto"),
        ("checkpoint_dir", None),
        ("checkpoint_dir", 7),
        ("checkpoint_dir", "a\0b"),
        ("model_repo_id", 7),
        ("staging_dir", False),
        ("best_metric_key", None),
        ("model_state_dict_keys", [1, 2]),
        ("skip_task_head_prefixes_for_base_model", "lm_head."),
    ],
)
def test_a_wrong_kind_does_not_get_by_because_it_is_true_or_iterable(key: str, value: object) -> None:
    with pytest.raises(ConfigError, match=key) as caught:
        CheckpointingConfig(**{key: value})  # type: ignore[arg-type]
    assert caught.value.hint


def test_paths_and_lists_of_every_kind_are_taken(tmp_path: Path) -> None:
    names = {"a.weight": 1, "b.weight": 2}
    config = CheckpointingConfig(
        staging_dir=tmp_path,  # type: ignore[arg-type]
        model_repo_id=tmp_path,  # type: ignore[arg-type]
        model_state_dict_keys=names.keys(),  # type: ignore[arg-type]
        skip_task_head_prefixes_for_base_model=("score.",),  # type: ignore[arg-type]
    )
    assert config.staging_dir == config.model_repo_id == str(tmp_path)
    assert config.model_state_dict_keys == ["a.weight", "b.weight"]
    assert config.skip_task_head_prefixes_for_base_model == ["score."]
    assert CheckpointingConfig.from_dict({"staging_dir": tmp_path}).staging_dir == str(tmp_path)


@pytest.mark.parametrize("key", ["checkpoint_dir", "model_cache_dir", "model_repo_id", "staging_dir"])
def test_the_home_directory(key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    config = CheckpointingConfig.from_yaml(f"checkpoint:\n  {key}: ~/runs/one\n")
    assert getattr(config, key) == str(tmp_path / "runs" / "one")
    assert str(getattr(CheckpointingConfig(**{key: Path("~/a")}), key)) == str(tmp_path / "a")  # type: ignore[arg-type]
    assert getattr(CheckpointingConfig(**{key: "a/~/b~"}), key) == "a/~/b~"  # type: ignore[arg-type]


# ---- from YAML -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_every_field_can_be_given_in_a_block(name: str) -> None:
    default = getattr(CheckpointingConfig(), name)
    given_value = default.value if isinstance(default, SaveConsolidatedMode) else default
    assert getattr(CheckpointingConfig.from_dict({name: given_value}), name) == default


BLOCK = """
checkpoint:
  enabled: true
  checkpoint_dir: runs/one
  model_save_format: safetensors
  save_consolidated: true
  max_recent_checkpoints: 3
  max_file_bytes: 1e9
  skip_task_head_prefixes_for_base_model: [lm_head., score.]
  collective_timeout_seconds: 5
"""


def test_a_block_as_it_stands(tmp_path: Path) -> None:
    config = CheckpointingConfig.from_yaml(BLOCK)
    assert config.checkpoint_dir == "runs/one"
    assert config.save_consolidated is SaveConsolidatedMode.EVERY
    assert (config.max_recent_checkpoints, config.max_file_bytes) == (3, 1_000_000_000)
    assert config.skip_task_head_prefixes_for_base_model == ["lm_head.", "score."]
    document = yaml.safe_load(BLOCK)
    assert CheckpointingConfig.from_dict(document) == config
    assert CheckpointingConfig.from_dict(document["checkpoint"]) == config
    assert CheckpointingConfig.from_dict(document | {"optimizer": {"lr": 1}, "model": None}) == config
    path = tmp_path / "run.yaml"
    path.write_text(BLOCK)
    assert CheckpointingConfig.from_yaml(path) == config
    assert CheckpointingConfig.from_yaml(str(path)) == config


@pytest.mark.parametrize("text", ["off", "False", "no", "'final'", "Every", "true", '"FALSE"'])
def test_modes_in_yaml(text: str) -> None:
    wanted = {"o": "false", "F": "false", "n": "false", "'": "final", "E": "every", "t": "every", '"': "false"}[text[0]]
    assert CheckpointingConfig.from_yaml(f"save_consolidated: {text}").consolidated_mode.value == wanted


def test_an_empty_block_gives_the_defaults() -> None:
    assert CheckpointingConfig.from_dict({}) == CheckpointingConfig()
    assert CheckpointingConfig.from_yaml("checkpoint:\n") == CheckpointingConfig()


@given(st.sampled_from(NAMES), st.data())
def test_a_misspelt_key_names_the_right_one(name: str, data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(name) - 1))
    misspelt = name[:at] + name[at + 1 :]
    if misspelt in NAMES:
        return
    with pytest.raises(ConfigError) as caught:
        CheckpointingConfig.from_dict({misspelt: 1})
    assert repr(misspelt) in str(caught.value)
    assert f"Did you mean {name!r}?" in str(caught.value)


@pytest.mark.parametrize("key", ["SAVE_CONSOLIDATED", "zzz", "", 3, None])
def test_any_unknown_key_is_an_error(key: object) -> None:
    with pytest.raises(ConfigError, match="Unknown key.*Did you mean"):
        CheckpointingConfig.from_dict({key: 1})  # type: ignore[dict-item]


def test_restore_from_belongs_to_restore() -> None:
    with pytest.raises(ConfigError, match=r"Checkpointer\.restore"):
        CheckpointingConfig.from_dict({"restore_from": "LATEST"})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("enabled", 1),
        ("enabled", "maybe"),
        ("enabled", None),
        ("dequantize_base_checkpoint", "yes"),
        ("max_recent_checkpoints", True),
        ("max_recent_checkpoints", 2.5),
        ("max_recent_checkpoints", "three"),
        ("max_file_bytes", [1]),
        ("max_file_bytes", "1e400"),
        ("collective_timeout_seconds", False),
        ("collective_timeout_seconds", "soon"),
        ("checkpoint_dir", 7),
        ("checkpoint_dir", None),
        ("model_repo_id", 7),
        ("best_metric_key", 1),
        ("model_state_dict_keys", "lm_head"),
        ("model_state_dict_keys", [1, 2]),
        ("save_consolidated", 1),
        ("allow_legacy_pickle_restore", "true"),
    ],
)
def test_a_wrong_type_names_its_key(key: str, value: object) -> None:
    with pytest.raises(ConfigError, match=key) as caught:
        CheckpointingConfig.from_dict({key: value})
    assert caught.value.hint


@given(st.integers(1, 10**18), st.sampled_from(["{}", "{:_}", "{:d}.0"]))
def test_numbers_written_as_text(number: int, form: str) -> None:
    text = form.format(number)
    wanted = number if "." not in text else int(float(text))
    assert CheckpointingConfig.from_dict({"max_file_bytes": text}).max_file_bytes == wanted


@pytest.mark.parametrize("source", ["- a\n- b", "just text", "", "a: [", "{a: 1"])
def test_what_is_not_a_block(source: str) -> None:
    with pytest.raises(ConfigError):
        CheckpointingConfig.from_yaml(source)


@pytest.mark.parametrize("block", [None, [], "x", {"checkpoint": [1]}, {"checkpoint": "x"}])
def test_what_is_not_a_mapping(block: object) -> None:
    with pytest.raises(ConfigError, match="checkpoint block is a"):
        CheckpointingConfig.from_dict(block)  # type: ignore[arg-type]


def test_a_file_that_is_absent_or_wrong_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.yaml"):
        CheckpointingConfig.from_yaml(tmp_path / "absent.yaml")
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text("checkpoint: {checkpoint_dirr: x}")
    with pytest.raises(ConfigError, match=r"wrong\.yaml.*Did you mean 'checkpoint_dir'"):
        CheckpointingConfig.from_yaml(wrong)
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"binary\.yaml"):
        CheckpointingConfig.from_yaml(binary)


def test_yaml_cannot_make_objects() -> None:
    with pytest.raises(ConfigError, match="not YAML"):
        CheckpointingConfig.from_yaml("checkpoint_dir: !!python/object/apply:os.system ['true']")


def test_build_makes_the_engine(tmp_path: Path) -> None:
    from shardwise import Checkpointer

    checkpointer = CheckpointingConfig(checkpoint_dir=tmp_path).build(0, 0, 0)
    try:
        assert isinstance(checkpointer, Checkpointer)
    finally:
        checkpointer.close()
