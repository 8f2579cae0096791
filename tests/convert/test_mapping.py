from __future__ import annotations

import pytest

from shardwise.convert.mapping import rename, revert
from shardwise.errors import ConversionError

LLAVA = {
    r"^language_model.model": "model.language_model",
    r"^vision_tower": "model.vision_tower",
    r"^language_model.lm_head": "lm_head",
}


def test_the_first_match_wins() -> None:
    mapping = {r"^a\.": "first.", r"^a": "second"}
    assert rename(["a.w", "ab.w", "c.w"], mapping) == ("first.w", "secondb.w", "c.w")


def test_groups_can_be_used() -> None:
    assert rename(["h.3.attn"], {r"^h\.(\d+)\.": r"layers.\1."}) == ("layers.3.attn",)


def test_revert_is_the_other_direction() -> None:
    native = ["model.language_model.norm.weight", "model.vision_tower.w", "lm_head.weight"]
    files = revert(native, LLAVA)
    assert files == ("language_model.model.norm.weight", "vision_tower.w", "language_model.lm_head.weight")
    assert rename(files, LLAVA) == tuple(native)


def test_assertions_in_a_pattern_are_no_text() -> None:
    mapping = {r"^visual": "model.visual", r"^model(?!\.(language_model|visual))": "model.language_model"}
    native = ["model.visual.w", "model.language_model.w"]
    assert revert(native, mapping) == ("visual.w", "model.w")


def test_a_collision_is_an_error_that_names_both() -> None:
    with pytest.raises(ConversionError, match=r"a\.w, b\.w all become 'w'"):
        rename(["a.w", "b.w"], {r"^[ab]\.": ""})


def test_a_mapping_that_does_not_come_back_is_an_error_that_lists_the_names() -> None:
    with pytest.raises(ConversionError, match="does not give back 1 of 2 names: x.w -> x.w -> y.w") as caught:
        revert(["x.w", "z.w"], {r"^x\.": "y."})
    assert caught.value.tensor == "x.w"
    assert caught.value.hint


@pytest.mark.parametrize(("pattern", "replacement"), [("(", "a"), ("a", r"\1")])
def test_what_is_no_regular_expression_is_an_error(pattern: str, replacement: str) -> None:
    with pytest.raises(ConversionError):
        rename(["a"], {pattern: replacement})


def test_groups_are_carried_back() -> None:
    mapping = {r"^backbone\.(attn|mlp)\.": r"model.\1.", r"^(\w+)_head\.(\d+)": r"heads.\2.\g<1>"}
    native = ["model.attn.w", "model.norm.w", "heads.3.lm.w"]
    files = revert(native, mapping)
    assert files == ("backbone.attn.w", "model.norm.w", "lm_head.3.w")
    assert rename(files, mapping) == tuple(native)


@pytest.mark.parametrize("pattern", [r"^x.*y", r"^(foo|bar)", r"h[0-9]", r"a{2}"])
def test_a_pattern_is_never_written_as_a_name(pattern: str) -> None:
    with pytest.raises(ConversionError, match="cannot be reverted") as caught:
        revert(["model.w"], {pattern: "model"})
    assert caught.value.tensor == "model.w"
