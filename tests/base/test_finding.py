"""A base model that is named is found, or is an error on every rank that lists where it was looked."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from tests.base.support import COMMIT, assert_same, checkpointer, hub_cache, llama, llama_config, on_meta
from tests.support.ranks import failure, run
from transformers import LlamaForCausalLM

from shardwise import Checkpointer, CheckpointingConfig
from shardwise.base.files import find_base, find_directory
from shardwise.errors import CheckpointNotFoundError, FormatError, ShardwiseError

EVERY: dict[str, object] = {"save_consolidated": "every"}


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A hub cache with two revisions of a model in two files."""
    for seed, commit, ref in ((1, COMMIT, "main"), (2, "f" * 40, "v2")):
        source = tmp_path / f"source-{seed}"
        llama(seed).save_pretrained(source, max_shard_size="40KB")
        hub_cache(tmp_path / "cache", "org/tiny", source, commit, ref)
    return tmp_path / "cache"


def saving(root: Path, settings: dict[str, object], how: str) -> None:
    """Save, or restore from nothing, on this rank."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    with Checkpointer(CheckpointingConfig(checkpoint_dir=root / "run", **settings), rank, 0, 0) as engine:  # type: ignore[arg-type]
        if how == "save":
            engine.save(0, 1, llama())
        elif how == "save_model":
            engine.save_model(llama(), root / "component")
        else:
            engine.restore(llama())


@pytest.mark.parametrize("how", ["save", "save_model", "restore"])
@pytest.mark.parametrize(
    "settings",
    [EVERY, {"save_consolidated": "false"}, {"model_save_format": "torch_save", "save_consolidated": "false"}],
    ids=["every", "shards", "torch_save"],
)
def test_a_mistyped_name_is_an_error_before_the_first_byte(
    cache: Path, tmp_path: Path, settings: dict[str, object], how: str
) -> None:
    named = {**settings, "model_repo_id": "org/tyni", "model_cache_dir": str(cache)}
    error = failure(1, saving, tmp_path, named, how)
    assert isinstance(error, CheckpointNotFoundError)
    text = str(error)
    assert text.startswith("the base model org/tyni is not there; looked at: ")
    assert "/org/tyni (nothing is there)" in text
    assert str(cache / "models--org--tyni") in text
    assert "allow_missing_base=True" in text
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "component").exists()


@pytest.mark.parametrize("how", ["save", "restore"])
def test_all_ranks_learn_of_a_base_that_is_not_there(cache: Path, tmp_path: Path, how: str) -> None:
    named = {**EVERY, "model_repo_id": "org/tiny", "model_cache_dir": str(cache / "other")}
    error = failure(2, saving, tmp_path, named, how)
    assert isinstance(error, CheckpointNotFoundError)
    assert str(cache / "other" / "models--org--tiny") in str(error)
    assert not (tmp_path / "run").exists()


def one_rank_alone(root: Path, cache: Path) -> None:
    place = cache if dist.get_rank() == 0 else cache / "other"
    saving(root, {**EVERY, "model_repo_id": "org/tiny", "model_cache_dir": str(place)}, "save")


def test_a_base_that_one_rank_lacks_is_an_error_on_all(cache: Path, tmp_path: Path) -> None:
    error = failure(2, one_rank_alone, tmp_path, cache)
    assert isinstance(error, CheckpointNotFoundError)
    assert error.rank == 1


@pytest.mark.parametrize("settings", [{"original_model_root_dir": "absent"}, {"model_repo_id": "org/tiny@v3"}])
def test_what_else_can_be_named_and_absent(cache: Path, tmp_path: Path, settings: dict[str, object]) -> None:
    error = failure(1, saving, tmp_path, {**EVERY, "model_cache_dir": str(cache), **settings}, "save")
    assert isinstance(error, CheckpointNotFoundError)
    place = next(iter(settings.values()))
    assert f"the base model {place} is not there" in str(error)


def test_from_scratch_under_a_bases_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    named: dict[str, object] = {**EVERY, "model_repo_id": "org/new", "model_cache_dir": str(tmp_path / "cache")}
    with caplog.at_level(logging.WARNING):
        saving(tmp_path, {**named, "allow_missing_base": True}, "save")
    assert "saving without a base model's files: the base model org/new is not there" in caplog.text
    export = tmp_path / "run" / "epoch_0_step_1" / "model" / "consolidated"
    assert_same(LlamaForCausalLM.from_pretrained(export), llama())


@pytest.mark.parametrize(("name", "seed"), [("org/tiny", 1), ("org/tiny@main", 1), ("org/tiny@v2", 2)])
def test_a_revision_means_the_same_in_every_place(cache: Path, tmp_path: Path, name: str, seed: int) -> None:
    source = tmp_path / f"source-{seed}"
    saving(tmp_path, {**EVERY, "model_repo_id": name, "model_cache_dir": str(cache)}, "save")
    export = tmp_path / "run" / "epoch_0_step_1" / "model" / "consolidated"
    index = "model.safetensors.index.json"
    split = [json.loads((place / index).read_text())["weight_map"] for place in (source, export)]
    assert split[0] == split[1]
    engine = checkpointer(tmp_path, model_cache_dir=str(cache))
    for root in (None, cache):
        fresh = on_meta(LlamaForCausalLM, llama_config())
        engine.load_base_model(fresh, "cpu", root, name)
        assert_same(fresh, llama(seed))


def test_a_stray_folder_does_not_hide_the_cache(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    stray = tmp_path / "org" / "tiny"
    stray.mkdir(parents=True)
    (stray / "notes.txt").write_text("mine")
    snapshot = cache / "models--org--tiny" / "snapshots" / COMMIT
    assert find_base(cache, "org/tiny") == snapshot
    with pytest.raises(CheckpointNotFoundError) as caught:
        find_base(tmp_path / "empty", "org/tiny")
    assert f"{stray} (a directory that holds no model)" in str(caught.value)
    # One that holds a model is taken, as transformers takes it, and both are named.
    save_file({"weight": torch.ones(2)}, stray / "model.safetensors")
    with caplog.at_level(logging.WARNING):
        assert find_base(cache, "org/tiny") == stray
    assert f"is at {stray}, which is taken, and also at {snapshot}" in caplog.text


def test_a_download_of_some_files_is_found(cache: Path) -> None:
    # What snapshot_download knows of the whole repository is no reason to refuse the files that were wanted of it.
    home = cache / "models--org--tiny"
    (home / "trees").mkdir()
    listed = {"README.md": {"size": 1, "blob_id": "b"}, "config.json": {"size": 1, "blob_id": "c"}}
    (home / "trees" / f"{COMMIT}.json").write_text(json.dumps({"format_version": 1, "files": listed}))
    assert find_base(cache, "org/tiny") == home / "snapshots" / COMMIT


def test_a_reference_leads_to_a_snapshot_of_its_model_or_nowhere(cache: Path) -> None:
    home = cache / "models--org--tiny"
    for text in ("0" * 40, "../../models--org--other", "..", "", "."):
        (home / "refs" / "main").write_text(text)
        with pytest.raises(CheckpointNotFoundError, match="there is no snapshot of the commit that main is"):
            find_base(cache, "org/tiny")
    (home / "refs" / "pr").mkdir()
    (home / "refs" / "main").write_bytes(b"\xff\xfe")
    with pytest.raises(FormatError, match="not text"):
        find_base(cache, "org/tiny")
    for name in ("org/tiny@pr", "org/tiny@../snapshots", "a/b/c", "org/tiny@main/../v2"):
        with pytest.raises(CheckpointNotFoundError):
            find_base(cache, name)


def test_what_describes_a_model_is_looked_for_as_the_model_is(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.chdir(tmp_path)
    home = cache / "models--org--tiny"
    for name in ("org/tiny", str(home), str(home / "snapshots" / COMMIT)):
        assert find_directory(name) == home / "snapshots" / COMMIT
    assert find_directory("org/tiny@v2") == home / "snapshots" / ("f" * 40)
    (tmp_path / "org" / "tiny").mkdir(parents=True)
    assert find_directory("org/tiny") == home / "snapshots" / COMMIT
    (tmp_path / "org" / "tiny" / "tokenizer_config.json").write_text("{}")
    assert find_directory("org/tiny") == tmp_path / "org" / "tiny"
    (tmp_path / "code").mkdir()
    assert find_directory("code") == tmp_path / "code"
    for name in ("org/absent", str(home / "refs" / "main"), "", None):
        assert find_directory(name) is None


def test_a_bin_only_base_gives_split_dtypes_and_proof(tmp_path: Path) -> None:
    base, state = tmp_path / "base", {n: t.bfloat16() for n, t in llama(1).state_dict().items()}
    base.mkdir()
    llama_config(architectures=["LlamaForCausalLM"]).save_pretrained(base)
    names = sorted(state)
    files = {"pytorch_model-00001-of-00002.bin": names[:9], "pytorch_model-00002-of-00002.bin": names[9:]}
    for file, own in files.items():
        torch.save({name: state[name] for name in own}, base / file)
    weight_map = {name: file for file, own in files.items() for name in own}
    (base / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    saving(tmp_path, {**EVERY, "model_repo_id": str(base)}, "save")
    export = tmp_path / "run" / "epoch_0_step_1" / "model" / "consolidated"
    found = {file.name: load_file(file) for file in export.glob("*.safetensors")}
    assert {file: sorted(tensors) for file, tensors in found.items()} == {
        file.replace("pytorch_model", "model").replace(".bin", ".safetensors"): own for file, own in files.items()
    }
    assert {tensor.dtype for tensors in found.values() for tensor in tensors.values()} == {torch.bfloat16}
    # What the base ships and the export lacks is found.
    torch.save({**{n: state[n] for n in names[9:]}, "model.extra.weight": torch.ones(2)}, base / list(files)[1])
    weight_map["model.extra.weight"] = list(files)[1]
    (base / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    error = failure(1, saving, tmp_path / "again", {**EVERY, "model_repo_id": str(base)}, "save")
    assert "model.extra.weight: the base model ships it, the export lacks it" in str(error)


def load_named(root: Path, name: str) -> list[float]:
    model = torch.nn.Linear(2, 2)
    torch.nn.init.constant_(model.weight, 7)
    engine = Checkpointer(CheckpointingConfig(checkpoint_dir=root))
    with pytest.raises(ShardwiseError) as caught:
        engine.load_base_model(model, "cpu", None, name)
    assert "is not there" in str(caught.value)
    return model.weight.flatten().tolist()  # type: ignore[no-any-return]


def test_nothing_is_overwritten_where_a_base_is_not_found(tmp_path: Path) -> None:
    assert run(2, load_named, tmp_path, str(tmp_path / "absent")) == [[7.0] * 4] * 2


def test_a_base_that_is_a_dcp_checkpoint_is_refused_for_saving(tmp_path: Path) -> None:
    import torch.distributed.checkpoint as dcp

    dcp.save(llama().state_dict(), checkpoint_id=tmp_path / "base")
    error = failure(1, saving, tmp_path, {**EVERY, "model_repo_id": str(tmp_path / "base")}, "save")
    assert isinstance(error, FormatError)
    assert str(error).startswith("the base model is a DCP checkpoint")


def test_an_adapter_names_its_base_without_having_it(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(llama(), peft.LoraConfig(target_modules=["q_proj"], r=2))
    with checkpointer(tmp_path, is_peft=True, model_repo_id="org/absent", model_cache_dir=str(tmp_path)) as engine:
        assert engine.save(0, 1, model) is not None
