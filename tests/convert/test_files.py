"""Loading files of the same model under other names than `save_pretrained` would use."""

from __future__ import annotations

import torch
from tests.convert import compare
from tests.convert.tiny_models import build

from shardwise.convert.derive import derive, for_files, identity
from shardwise.convert.rules import Conversion, NativeSpec, to_hub


def load(conversion: Conversion, files: compare.Tensors, state: compare.Tensors) -> compare.Tensors:
    """What a blank model has after reading ``files`` through the views."""
    blank = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    for held in to_hub(conversion, compare.whole(blank)).held:
        if held.spec.name in files:
            source = files[held.spec.name].reshape(held.grid)
            for fragment in held.fragments:
                fragment.data.copy_(compare._at(source, fragment.box))
    return blank


def test_files_as_save_pretrained_writes_them_change_nothing() -> None:
    model = build("qwen3_moe")
    specs = compare.specs_of(compare.saved_state(model))
    conversion = derive(model, specs)
    assert for_files(model, conversion, specs, conversion.names) is conversion


def test_a_base_model_in_a_model_with_a_head_and_the_other_way_round() -> None:
    model = build("qwen3_moe")
    state = compare.saved_state(model)
    for outer, inner, prefix in ((model, model.model, "model."), (model.model, model, "")):
        natives = compare.saved_state(outer)
        specs = compare.specs_of(natives)
        files = compare.reference(inner)
        found = for_files(outer, derive(outer, specs), specs, list(files))
        loaded = load(found, files, natives)
        for name in natives:
            if name != "lm_head.weight":
                assert torch.equal(loaded[name], state[name if prefix else f"model.{name}"]), name
    assert "lm_head.weight" in derive(model, compare.specs_of(state)).names


def test_files_in_the_models_own_form_are_taken_unconverted() -> None:
    for key in ("qwen3_moe", "kimi_k25", "gemma3"):
        model = build(key)
        state = compare.saved_state(model)
        specs = compare.specs_of(state)
        found = for_files(model, derive(model, specs), specs, list(state))
        assert set(found.names) == set(state)
        compare.assert_same(load(found, state, state), state)


def test_names_of_the_original_authors() -> None:
    model = build("llava")
    state = compare.saved_state(model)
    specs = compare.specs_of(state)
    conversion = derive(model, specs)
    files = {
        name.replace("vision_tower.", "vision_tower.vision_model."): tensor
        for name, tensor in compare.reference(model).items()
    }
    assert set(files) != set(conversion.names)
    found = for_files(model, conversion, specs, list(files))
    assert set(found.names) == set(files)
    compare.assert_same(load(found, files, state), state)


def test_a_key_mapping_comes_first() -> None:
    model = build("qwen3_moe")
    state = compare.saved_state(model)
    specs = compare.specs_of(state)
    files = {f"policy.{name}": tensor for name, tensor in compare.reference(model).items()}
    found = for_files(model, derive(model, specs), specs, list(files), {r"^policy\.": ""})
    assert set(found.names) == set(files)
    compare.assert_same(load(found, files, state), state)


def test_what_is_not_there_keeps_its_hub_name() -> None:
    model = torch.nn.Linear(2, 3)
    specs = [NativeSpec("weight", (3, 2), "F32"), NativeSpec("bias", (3,), "F32")]
    found = for_files(model, identity(specs), specs, ["w", "bias"], {"^w$": "weight"})
    assert found.names == ("w", "bias")
    assert for_files(model, identity(specs), specs, ["bias"]).names == ("weight", "bias")
