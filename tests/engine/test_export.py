"""The export: what plain transformers opens, with the base model's files and dtypes, and nothing else on disk."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from tests.engine.setups import Digests, checkpointer, digest
from tests.support.ranks import run
from tests.support.simulate import raw
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from shardwise.format.index import read_index
from shardwise.stateful_wrappers import ModelState


def llama(*, tied: bool = False, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=60,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=101,
        tie_word_embeddings=tied,
        dtype=dtype,
    )
    return LlamaForCausalLM(config).to(dtype)


def spread(model: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("dp",))
    for layer in model.model.layers:  # type: ignore[union-attr]
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    ids = torch.arange(20).view(2, 10)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def digests(model: nn.Module) -> Digests:
    return {name: digest(tensor) for name, tensor in ModelState(model).state_dict().items()}


def whole(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: t.full_tensor() if hasattr(t, "full_tensor") else t for name, t in model.state_dict().items()}  # type: ignore[operator]


def opens_plainly(directory: Path) -> nn.Module:
    """Open an export with plain transformers; nothing may be missing, unexpected, mismatched or newly initialised."""
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True, dtype="auto")
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert not info.get("error_msgs")
    return model


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model in bfloat16, in several files, one of its norms in float32."""
    path = tmp_path_factory.mktemp("base")
    llama(dtype=torch.bfloat16, seed=7).save_pretrained(path, max_shard_size="20KB")  # type: ignore[operator]
    file = path / read_index(path / "model.safetensors.index.json").weight_map["model.norm.weight"]
    tensors = load_file(file)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].float()
    save_file(tensors, file, {"format": "pt"})
    assert len(list(path.glob("*.safetensors"))) > 2
    return path


def finetune(base: Path, root: Path, dtype: torch.dtype) -> Digests:
    model = spread(llama(dtype=dtype))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with checkpointer(root, save_consolidated="every", model_repo_id=str(base)) as engine:
        engine.load_model(model, base, is_init_step=True)
        step(model, optimizer)
        engine.save(0, 1, model, optimizer)
    found = digests(model)
    tensors = whole(model)
    if dist.get_rank() == 0:
        save_file(tensors, root / "truth.safetensors")
    return found


def restore(root: Path, dtype: torch.dtype) -> Digests:
    model = spread(llama(dtype=dtype, seed=3))
    with checkpointer(root, save_consolidated="every") as engine:
        assert engine.restore(model) is not None
    return digests(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("world", [1, 3])
def test_files_and_dtypes_of_the_base_come_back(tmp_path: Path, base: Path, world: int, dtype: torch.dtype) -> None:
    trained = run(world, finetune, base, tmp_path, dtype)[0]
    export = tmp_path / "epoch_0_step_1" / "model" / "consolidated"
    theirs, ours = (read_index(d / "model.safetensors.index.json") for d in (base, export))
    assert ours.weight_map == theirs.weight_map
    truth = load_file(tmp_path / "truth.safetensors")
    total = 0
    for file in sorted(set(ours.weight_map.values())):
        written = load_file(export / file)
        for name, tensor in load_file(base / file).items():
            assert written[name].dtype == tensor.dtype
            assert raw(written[name]) == raw(truth[name].to(tensor.dtype))
            total += tensor.nbytes
    assert ours.metadata["total_size"] == total
    opens_plainly(export)
    # What the export rounds is beside it in full, and training resumes from that.
    for readers in (1, 2):
        assert run(readers, restore, tmp_path, dtype) == [trained] * readers
    shards = list((tmp_path / "epoch_0_step_1" / "model").glob("shard-*"))
    assert bool(shards) == (dtype is torch.float32)


def save_tied(root: Path, kind: str) -> tuple[Digests, list[str]]:
    model = llama(tied=True)
    if kind == "claimed":  # the configuration says tied, and the head is another tensor
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach() + 1)  # type: ignore[union-attr]
    spread(model)
    with checkpointer(root, save_consolidated="every", verify_export=False) as engine:
        engine.save(0, 1, model)
        other = llama(tied=True, seed=5)
        if kind == "claimed":
            other.lm_head.weight = nn.Parameter(other.lm_head.weight.detach() + 1)  # type: ignore[union-attr]
        spread(other)
        engine.restore(other)
    assert digests(other) == digests(model)
    assert (other.lm_head.weight is other.model.embed_tokens.weight) == (kind == "tied")  # type: ignore[union-attr]
    return digests(model), sorted(ModelState(model).state_dict())


@pytest.mark.parametrize("world", [1, 2])
def test_a_tied_head_is_written_once_and_comes_back(tmp_path: Path, world: int) -> None:
    run(world, save_tied, tmp_path, "tied")
    export = tmp_path / "epoch_0_step_1" / "model" / "consolidated"
    assert "lm_head.weight" not in load_file(export / "model.safetensors")
    model = opens_plainly(export)
    assert model.lm_head.weight is model.model.embed_tokens.weight  # type: ignore[union-attr]


@pytest.mark.parametrize("world", [1, 2])
def test_a_head_that_only_claims_to_be_tied_is_kept(tmp_path: Path, world: int) -> None:
    run(world, save_tied, tmp_path, "claimed")
    tensors = load_file(tmp_path / "epoch_0_step_1" / "model" / "consolidated" / "model.safetensors")
    assert torch.equal(tensors["lm_head.weight"], tensors["model.embed_tokens.weight"] + 1)


def load_untied_file(path: Path) -> bool:
    model = spread(llama(tied=True))
    with checkpointer(path) as engine:
        engine.load_model(model, path)
    return all(
        torch.equal(tensor, load_file(path / "model.safetensors")[name]) for name, tensor in whole(model).items()
    )


def test_a_file_that_names_both_ends_of_a_tie_loads(tmp_path: Path) -> None:
    model = llama(tied=True, seed=4)
    save_file({name: tensor.clone() for name, tensor in model.state_dict().items()}, tmp_path / "model.safetensors")
    assert "lm_head.weight" in load_file(tmp_path / "model.safetensors")
    assert run(2, load_untied_file, tmp_path) == [True, True]


def save_twice(root: Path) -> None:
    model = spread(llama())
    for settings in ({"max_file_bytes": 20_000}, {}, {"save_consolidated": "false"}):
        with checkpointer(root, **({"save_consolidated": "every"} | settings)) as engine:
            engine.save_model(model, root)
        dist.barrier()
        if dist.get_rank() == 0:
            name = f"{len(list(root.glob('*.json')))}.json"
            files = sorted(str(p.relative_to(root / "model")) for p in (root / "model").rglob("*.safetensors*"))
            (root / name).write_text(json.dumps(files))
        dist.barrier()


def test_saving_again_leaves_nothing_of_before(tmp_path: Path) -> None:
    run(2, save_twice, tmp_path)
    many, one, shards = (json.loads((tmp_path / f"{number}.json").read_text()) for number in range(3))
    assert len(many) > 4
    assert one == ["consolidated/model.safetensors", "consolidated/model.safetensors.index.json"]
    assert [name.partition("-model")[0] for name in shards] == ["shard-00001", "shard-00002"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["0.json", "1.json", "2.json", "model"]


def save_final(root: Path) -> None:
    model = spread(llama())
    with checkpointer(root, save_consolidated="final") as engine:
        engine.save(0, 1, model)
        engine.save(0, 2, model, is_final_checkpoint=True)


def test_final_exports_the_last_one_only(tmp_path: Path) -> None:
    run(2, save_final, tmp_path)
    first, last = (tmp_path / f"epoch_0_step_{n}" / "model" for n in (1, 2))
    assert list(first.glob("shard-*"))
    assert not (first / "consolidated").exists()
    assert not list(last.glob("shard-*"))
    opens_plainly(last / "consolidated")


def test_the_export_takes_no_more_than_the_parameters(tmp_path: Path) -> None:
    run(2, save_final, tmp_path)
    model = tmp_path / "epoch_0_step_2" / "model"
    files = list(model.rglob("*.safetensors"))
    tensors = load_file(files[0])
    assert len(files) == 1
    assert files[0].stat().st_size - sum(t.nbytes for t in tensors.values()) < 4096
    assert raw(tensors["model.norm.weight"]) == raw(torch.ones(32))
