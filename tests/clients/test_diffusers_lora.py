"""Adapters of diffusers' models: the files are diffusers' own, open there and here, and are resumed from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.clients.adapters_whole import checkpointer, two_alone
from tests.clients.lora import step, values
from tests.peft.models import causal, randomise
from tests.support.ranks import fresh, run
from torch import nn

import peft
from shardwise import CheckpointingConfig
from shardwise.cli import main
from shardwise.errors import AdapterError, AmbiguousFilesError, ShardwiseError, UnexpectedTensorError
from shardwise.ops.inspect import inspect
from shardwise.ops.verify import verify

pytest.importorskip("diffusers")
from tests.clients.diffusers_lora import (
    BY_THE_MODEL_ALONE,
    KINDS,
    MODEL_WEIGHTS,
    WEIGHTS,
    adapted,
    denoised,
    lora,
    pipeline,
    prefix_of,
    rewritten,
    save_as_diffusers,
    save_evaluated,
    save_merged,
    sd3,
    unet,
)


def saver(root: Path, **settings: Any) -> Any:
    return checkpointer(root, diffusers_compatible=True, **settings)


def same_files(ours: Path, theirs: Path) -> None:
    """Byte for byte; entries of the header and of sets lie in the order of a hash table in diffusers' files."""
    first, second = ours.read_bytes(), theirs.read_bytes()
    sizes = [int.from_bytes(each[:8], "little") for each in (first, second)]
    assert sizes[0] == sizes[1]
    assert first[8 + sizes[0] :] == second[8 + sizes[1] :]
    headers = [json.loads(each[8 : 8 + sizes[0]], object_pairs_hook=list) for each in (first, second)]
    noted = [dict(header.pop(0)[1]) for header in headers]
    assert headers[0] == headers[1]
    settings = [json.loads(each.pop("lora_adapter_metadata")) for each in noted]
    for each in settings:
        for key, value in each.items():
            each[key] = sorted(value) if isinstance(value, list) and key.endswith(("modules", "to_save")) else value
    assert settings[0] == settings[1]
    assert noted[0] == noted[1]


def opened_by_diffusers(kind: str, directory: Path) -> nn.Module:
    model = KINDS[kind][0]()
    if kind in BY_THE_MODEL_ALONE:
        model.load_lora_adapter(directory, prefix=prefix_of(model), use_safetensors=True)
    else:
        pipeline(model).load_lora_weights(directory)
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_the_file_is_diffusers_own_and_opens_everywhere(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = adapted(kind, 1)
    with saver(tmp_path) as ours:
        ours.save_model(model, tmp_path / "ours")
        saved = tmp_path / "ours/model"
        # SD3's positions are a buffer, which a forward pass might change for all that anybody knows.
        there = {path.name for path in saved.iterdir()}
        assert there - {"manifest.json"} == {WEIGHTS, *(["adapter_extra.safetensors"] if KINDS[kind][0] is sd3 else [])}
        same_files(saved / WEIGHTS, save_as_diffusers(model, tmp_path / "theirs"))
        again = adapted(kind, 2)
        assert not torch.equal(denoised(again), denoised(model))
        ours.load_model(again, saved)
    assert torch.equal(denoised(again), denoised(model))
    assert torch.equal(denoised(opened_by_diffusers(kind, saved)), denoised(model))
    assert ("most pipelines of diffusers refuses it" in caplog.text) == (kind in (*BY_THE_MODEL_ALONE, "flux head"))


@pytest.mark.parametrize("kind", ["conv", "flux"])
def test_a_peft_model_around_the_denoiser_gives_the_same_file(kind: str, tmp_path: Path) -> None:
    plain, around = adapted(kind, 1), adapted(kind, 1, whole=True)
    with saver(tmp_path) as ours:
        ours.save_model(around, tmp_path / "around")
        ours.save_model(plain, tmp_path / "plain")
        assert (tmp_path / "around/model" / WEIGHTS).read_bytes() == (tmp_path / "plain/model" / WEIGHTS).read_bytes()
        again = adapted(kind, 2, whole=True)
        ours.load_model(again, tmp_path / "plain/model")
    assert torch.equal(denoised(again), denoised(plain))


def gathered(kind: str, path: Path) -> nn.Module:
    model = adapted(kind, 0)
    model.load_state_dict({name: tensors[0] for name, tensors in torch.load(path).items()}, strict=False)
    return model


@pytest.mark.parametrize("kind", ["conv", "head"])
def test_two_ranks_resume_bit_for_bit(kind: str, tmp_path: Path) -> None:
    run(2, save_evaluated, kind, str(tmp_path), False, seconds=200)
    model = gathered(kind, tmp_path / "values.pt")
    saved = tmp_path / "LATEST/model"
    same_files(saved / WEIGHTS, save_as_diffusers(model, tmp_path / "theirs"))
    assert torch.equal(denoised(opened_by_diffusers(kind, saved)), denoised(model))
    alone = adapted(kind, 9)
    optimizer = torch.optim.AdamW([p for p in alone.parameters() if p.requires_grad], lr=1.0)
    with saver(tmp_path) as ours:
        ours.restore(alone, optimizer)
    expected, found = torch.load(tmp_path / "values.pt"), values(alone, optimizer)
    assert expected.keys() == found.keys()
    for name, tensors in expected.items():
        assert all(torch.equal(a, b) for a, b in zip(found[name], tensors, strict=True)), name


@pytest.mark.parametrize("kind", ["dora", "flux"])
@pytest.mark.parametrize("whole", [False, True])
def test_merged_on_the_way_it_is_diffusers_own_model(kind: str, whole: bool, tmp_path: Path) -> None:
    model = adapted(kind, 1, whole=whole)
    with saver(tmp_path, export_merged=True, save_consolidated="every") as ours:
        ours.restore(model)
        ours.save(0, 1, model)
    saved = tmp_path / "LATEST/model"
    assert (saved / WEIGHTS).is_file()
    merged = save_merged(model, tmp_path / "theirs")
    found, expected = (load_file(path / MODEL_WEIGHTS) for path in (saved / "consolidated", tmp_path / "theirs"))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name].view(torch.uint8), t.view(torch.uint8)) for name, t in expected.items())
    config, theirs = (
        json.loads((path / "config.json").read_text()) for path in (saved / "consolidated", tmp_path / "theirs")
    )
    assert {key: config.get(key) for key in theirs} == theirs
    opened = [type(merged).from_pretrained(path) for path in (saved / "consolidated", tmp_path / "theirs")]
    assert torch.equal(*map(denoised, opened))


def test_a_save_in_the_background(tmp_path: Path) -> None:
    output, store = tmp_path / "output", str(tmp_path / "store")
    code = fresh(two_alone, store, save_evaluated, "dora", str(tmp_path), True, output=output, seconds=200)
    assert code == 0, output.with_name("output.err").read_text()
    model = gathered("dora", tmp_path / "values.pt")
    same_files(tmp_path / "LATEST/model" / WEIGHTS, save_as_diffusers(model, tmp_path / "theirs"))


def test_several_adapters(tmp_path: Path) -> None:
    def two(seed: int) -> Any:
        model = adapted("patterns", seed)
        model.add_adapter(lora(r=2), adapter_name="ref")
        randomise(model, seed + 1)
        return model

    model = two(1)
    with saver(tmp_path) as ours:
        ours.save_model(model, tmp_path / "ours")
        saved = tmp_path / "ours/model"
        same_files(saved / WEIGHTS, save_as_diffusers(model, tmp_path / "theirs"))
        same_files(saved / "ref" / WEIGHTS, save_as_diffusers(model, tmp_path / "theirs/ref", "ref"))
        again = two(7)
        ours.load_model(again, saved)
    first, second = dict(model.named_parameters()), dict(again.named_parameters())
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_files_that_diffusers_wrote_are_opened(tmp_path: Path) -> None:
    model = adapted("patterns", 1)
    file = save_as_diffusers(model, tmp_path / "pipeline")
    model.save_lora_adapter(tmp_path / "model")
    for settings in ({}, {"diffusers_compatible": True}):
        with checkpointer(tmp_path, **settings) as ours:
            for place in (tmp_path / "pipeline", file, tmp_path / "model"):
                again = adapted("patterns", 2)
                ours.load_model(again, place)
                assert torch.equal(denoised(again), denoised(model)), place
    other = sd3()
    other.add_adapter(lora(rank_pattern={"to_q": 2}, alpha_pattern={"to_q": 8}, use_rslora=True))
    with saver(tmp_path) as ours, pytest.raises(AdapterError, match="alpha_pattern was"):
        ours.load_model(other, file)


def test_peft_s_files_of_such_models_are_opened_too(tmp_path: Path) -> None:
    model = adapted("conv", 1)
    with checkpointer(tmp_path) as plain:
        plain.save_model(model, tmp_path / "peft")
        again = adapted("conv", 2)
    with saver(tmp_path) as ours:
        ours.load_model(again, tmp_path / "peft/model")
        assert torch.equal(denoised(again), denoised(model))
        save_as_diffusers(model, tmp_path / "peft/model")
        with pytest.raises(AmbiguousFilesError, match=r"of peft and of diffusers: adapter_model.*pytorch_lora"):
            ours.load_model(again, tmp_path / "peft/model")


def test_files_without_settings_have_scale_one(tmp_path: Path) -> None:
    def built(seed: int, **settings: Any) -> Any:
        model = unet()
        model.requires_grad_(False)
        model.add_adapter(
            lora(**{"lora_alpha": 4, "rank_pattern": {"to_q": 2}, "alpha_pattern": {"to_q": 2}, **settings})
        )
        randomise(model, seed)
        return model

    model = built(1)
    file = save_as_diffusers(model, tmp_path / "bare", metadata=False)
    tensors = load_file(file)
    # Releases of diffusers have had other names; another model of the pipeline may be in the same file.
    old = {name.replace("lora_A", "lora.down").replace("lora_B", "lora.up"): t for name, t in tensors.items()}
    processors = [
        ("attn1.to_q.lora_A", "attn1.processor.to_q_lora.down"),
        ("attn1.to_q.lora_B", "attn1.processor.to_q_lora.up"),
    ]
    oldest = {}
    for name, tensor in tensors.items():
        for new, former in processors:
            name = name.replace(new, former)
        oldest[name] = tensor
    assert oldest.keys() != tensors.keys()
    rewritten(oldest, tmp_path / "oldest" / WEIGHTS)
    rewritten(old, tmp_path / "old" / WEIGHTS)
    with saver(tmp_path) as ours:
        for place in ("bare", "old", "oldest"):
            again = built(2)
            ours.load_model(again, tmp_path / place)
            assert torch.equal(denoised(again), denoised(model)), place
        named = {name.replace("unet.", "denoiser.", 1): tensor for name, tensor in tensors.items()}
        again, file_of = built(2), rewritten(named, tmp_path / "named" / WEIGHTS)
        ours.load_model(again, file_of, key_mapping={r"^denoiser\.": "unet."})
        assert torch.equal(denoised(again), denoised(model))
        both = {**tensors, "text_encoder.layers.0.q_proj.lora_A.weight": torch.zeros(2, 2)}
        again = built(2)
        ours.load_model(again, rewritten(both, tmp_path / "both" / WEIGHTS))
        assert torch.equal(denoised(again), denoised(model))
        with pytest.raises(AdapterError, match=r"the layer '.*to_k' has scale 1\.5"):
            ours.load_model(built(2, lora_alpha=6), file)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({"lora_unet_down_blocks_0.lora_down.weight": (2, 2)}, "a name that other tools give"),
        ({"unet.mid_block.attentions.0.proj_in.alpha": ()}, "a name that other tools give"),
        ({"diffusion_model.layers.0.lora_A.weight": (2, 2)}, "a name that other tools give"),
        ({"text_encoder.layers.0.lora_A.weight": (2, 2)}, "has LoRA of text_encoder, and none of unet"),
        ({"unet.conv_in.lora_A.weight": (2, 2), "vae.conv.lora_A.weight": (2, 2)}, "is of no model that a pipeline"),
    ],
)
def test_names_that_are_not_understood(names: dict[str, tuple[int, ...]], message: str, tmp_path: Path) -> None:
    file = rewritten({name: torch.zeros(shape) for name, shape in names.items()}, tmp_path / WEIGHTS)
    with saver(tmp_path) as ours, pytest.raises(AdapterError, match=message):
        ours.load_model(adapted("conv", 1), file)


def test_settings_and_tensors_that_do_not_belong_there(tmp_path: Path) -> None:
    model = adapted("conv", 1)
    file = save_as_diffusers(model, tmp_path / "whole")
    tensors = {**load_file(file), "unet.conv_norm_out.lora_A.weight": torch.zeros(2, 2)}
    save_file(tensors, tmp_path / "more.safetensors")
    save_file(load_file(file), tmp_path / "damaged.safetensors", {"lora_adapter_metadata": "{"})
    save_file(load_file(file), tmp_path / "list.safetensors", {"lora_adapter_metadata": "[]"})
    scaled = unet()
    scaled.add_adapter(lora(lora_alpha=4, target_modules=KINDS["conv"][1]().target_modules))
    with saver(tmp_path) as ours:
        with pytest.raises(UnexpectedTensorError, match="conv_norm_out"):
            ours.load_model(scaled, tmp_path / "more.safetensors")
        for name in ("damaged", "list"):
            with pytest.raises(AdapterError, match="lora_adapter_metadata in the header is not"):
                ours.load_model(scaled, tmp_path / f"{name}.safetensors")


def own(config: Any, build: Any = sd3) -> nn.Module:
    model: nn.Module = build()
    peft.inject_adapter_in_model(config, model)
    return model


def controlnet() -> nn.Module:
    from diffusers import ControlNetModel

    return ControlNetModel.from_unet(unet())


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: own(peft.LoHaConfig(r=4, target_modules=["to_q"])), "its method is LOHA"),
        (lambda: own(lora(target_parameters=["proj_out.weight"])), "target_parameters is"),
        (lambda: own(lora(init_lora_weights="pissa")), "init_lora_weights is 'pissa'"),
        (
            lambda: peft.get_peft_model(causal("llama"), lora(target_modules=["q_proj"])),
            "LoRA file of LlamaForCausalLM",
        ),
        (lambda: own(lora(), controlnet), "LoRA file of ControlNetModel"),
    ],
    ids=["loha", "parameters", "pissa", "llama", "controlnet"],
)
def test_what_diffusers_does_not_open_is_refused_before_training(build: Any, message: str, tmp_path: Path) -> None:
    model = build()
    with saver(tmp_path) as ours:
        with pytest.raises(AdapterError, match=message):
            ours.restore(model)
        with pytest.raises(AdapterError, match=message):
            ours.save_model(model, tmp_path / "out")


def test_the_tools_know_such_directories(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = adapted("conv", 1)
    with saver(tmp_path) as ours:
        ours.save(0, 1, model, step(model))
    saved = tmp_path / "LATEST/model"
    assert not verify(tmp_path / "LATEST").damages
    names = {tensor.spec.name for tensor in inspect(tmp_path / "LATEST").tensors}
    assert load_file(saved / WEIGHTS).keys() <= names
    for place in ("LATEST", "LATEST/model"):
        assert main(["consolidate", "--diffusers", str(tmp_path / place), "--output", str(tmp_path / "out")]) == 2
        assert "this is an adapter, which is saved in its final form" in capsys.readouterr().err
    data = bytearray((saved / WEIGHTS).read_bytes())
    data[-1] ^= 1
    (saved / WEIGHTS).write_bytes(data)
    assert verify(tmp_path / "LATEST").damages
    bare = tmp_path / "bare"
    save_as_diffusers(model, bare)
    with (
        CheckpointingConfig(checkpoint_dir=tmp_path).build(0, 0, 0) as whole,
        pytest.raises(ShardwiseError, match="It holds an adapter"),
    ):
        whole.load_model(unet(), bare)


@pytest.mark.slow
def test_a_large_adapter_is_one_file(tmp_path: Path) -> None:
    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(2**20, 1, bias=False), nn.Linear(2**20, 1, bias=False)

    model = peft.get_peft_model(Wide(), peft.LoraConfig(r=70, target_modules=["first", "second"]))
    with checkpointer(tmp_path) as ours:
        ours.save_model(model, tmp_path / "out")
    files = {path.name for path in (tmp_path / "out/model").glob("*.safetensors*")}
    assert files == {"adapter_model.safetensors"}
    assert (tmp_path / "out/model/adapter_model.safetensors").stat().st_size > 512 * 2**20
