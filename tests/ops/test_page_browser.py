"""The page in a real browser: it opens, finds, colours and zooms, by mouse and by keyboard, and runs nobody's code."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlencode

import pytest
import torch
from safetensors.torch import save_file
from tests.ops.pages import HOSTILE, write_model
from tests.support.browser import CHROMIUM, Page, browser

from shardwise.ops.page import write_page

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")

LAYERS = 12
PARTS = ("input_layernorm", "mlp.down_proj", "mlp.up_proj", "self_attn.q_proj")


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with browser(tmp_path_factory.mktemp("browser") / "profile") as page:
        yield page


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pages of a small model in two shards, of one with hostile names, and of what changed."""
    root = tmp_path_factory.mktemp("pages")
    names = sorted(f"model.layers.{layer}.{part}.weight" for layer in range(LAYERS) for part in PARTS)
    for number, own in enumerate((names[:20], names[20:])):
        file = root / "model" / f"__{number}_0.safetensors"
        write_model(file, [(name, "F32" if "norm" in name else "BF16", (64, 64)) for name in own])
    write_page(root / "model", root / "model.html")
    write_model(root / "hostile" / "model.safetensors", [(name, "U8", (50,)) for name in HOSTILE])
    write_page(root / "hostile", root / "hostile.html")
    for place, factor in ((root / "old", 1.0), (root / "new", 1.25)):
        for part in ("unet", "vae"):
            (place / part).mkdir(parents=True)
            tensors = {f"{part[0]}.{i}.w": torch.full((64,), factor if i % 2 else 1.0) for i in range(6)}
            save_file(tensors, place / part / "diffusion_pytorch_model.safetensors")
        (place / "model_index.json").write_text("{}")
    write_page(root / "new", root / "change.html", against=root / "old")
    return root


def opened(tab: Page, file: Path, *, width: int = 1280, dark: bool = False, **state: str) -> None:
    """Open a page; nothing may go wrong in it, and it may ask for nothing."""
    tab.look(width, 900, dark=dark)
    tab.events.clear()
    tab.open(file, urlencode(state))
    assert int(tab.run("document.documentElement.dataset.ready")) >= 0
    for event in tab.events:
        assert event["method"] not in ("Runtime.exceptionThrown", "Log.entryAdded"), event
        if event["method"] == "Network.requestWillBeSent":
            assert event["params"]["request"]["url"].startswith(("file:", "about:")), event


def seen(tab: Page) -> list[str]:
    """Names in the rows of the list."""
    return list(tab.run("[...document.querySelectorAll('#rows .n')].map(cell => cell.title)"))


def colours(tab: Page) -> set[tuple[int, ...]]:
    """The colours of the first lane of the map, a little below its upper edge."""
    tab.settle()
    code = (
        "(() => { const y = Math.round((map.top(0) + 3) * map.ratio); "
        "return [...map.canvas.getContext('2d').getImageData(0, y, map.canvas.width, 1).data]; })()"
    )
    data = tab.run(code)
    pixels = [tuple(data[i : i + 3]) for i in range(0, len(data), 4) if data[i + 3]]
    return {pixel for pixel in pixels if pixels.count(pixel) > 8}


def text(tab: Page, selector: str) -> str:
    return str(tab.run(f"document.querySelector({selector!r}).innerText"))


def test_all_tensors_are_shown_in_their_places(tab: Page, pages: Path) -> None:
    opened(tab, pages / "model.html")
    assert text(tab, "#count") == f"{LAYERS * len(PARTS)} tensors"
    assert text(tab, "h1") == "model"
    assert tab.run("map.lanes.map(file => file.path)") == ["__0_0.safetensors", "__1_0.safetensors"]
    assert tab.run("document.getElementById('rows').offsetHeight / list.step") == LAYERS * len(PARTS)
    # Offsets and sizes to scale: in the middle of each piece of the map is that piece.
    places = (
        "map.lanes.every((file, lane) => { for (let i = file.first; i < file.last; i += 1) { "
        "const x = (model.piece.offset[i] + model.piece.nbytes[i] / 2) * map.width / map.most; "
        "if (map.pieceAt(x, map.top(lane) + 5) !== i) return false; } return true; })"
    )
    assert tab.run(places) is True


def test_search_finds_a_tensor(tab: Page, pages: Path) -> None:
    opened(tab, pages / "model.html")
    before = colours(tab)
    tab.press("/", "/")
    tab.type("layers.7. Q_PROJ bf16")
    assert seen(tab) == ["model.layers.7.self_attn.q_proj.weight"]
    assert text(tab, "#count") == f"1 of {LAYERS * len(PARTS)} tensors"
    assert colours(tab) != before
    tab.press("Enter")
    assert text(tab, ".fullname") == "model.layers.7.self_attn.q_proj.weight"
    assert "none: there is no manifest" in text(tab, "#details")
    assert "search=layers.7" in tab.run("location.hash")
    tab.press("Escape")
    assert text(tab, "#count") == f"{LAYERS * len(PARTS)} tensors"
    tab.type("no such tensor")
    assert text(tab, "#rows") == "No tensor matches."


def test_colours_switch(tab: Page, pages: Path) -> None:
    opened(tab, pages / "model.html")
    found = {"module": (colours(tab), text(tab, "#legend"))}
    for mode in ("dtype", "rank"):
        tab.run(f"document.querySelector('[data-value={mode}]').click()")
        found[mode] = (colours(tab), text(tab, "#legend"))
    assert "model.layers.*.self_attn" in found["module"][1]
    assert {"F32", "BF16"} <= set(found["dtype"][1].split())
    assert "not recorded" in found["rank"][1]  # no shards and no DCP: their names are nothing that tells
    assert len(found["module"][0]) > len(found["rank"][0])
    # A click on an entry of the legend leaves only what is in it.
    tab.run("document.querySelector('[data-value=dtype]').click()")
    tab.run("[...document.querySelectorAll('.entry')].find(entry => entry.innerText.startsWith('F32')).click()")
    assert text(tab, "#count") == f"{LAYERS} of {LAYERS * len(PARTS)} tensors"
    assert all("norm" in name for name in seen(tab))


def test_light_and_dark(tab: Page, pages: Path) -> None:
    paper = "getComputedStyle(document.documentElement).backgroundColor"
    opened(tab, pages / "model.html")
    light, in_light = tab.run(paper), colours(tab)
    opened(tab, pages / "model.html", dark=True)
    dark, in_dark = tab.run(paper), colours(tab)
    assert light != dark
    assert not in_light & in_dark
    tab.run("document.querySelector('[data-value=light]').click()")
    assert (tab.run(paper), colours(tab)) == (light, in_light)
    opened(tab, pages / "model.html", theme="dark")
    assert (tab.run(paper), colours(tab)) == (dark, in_dark)


def test_the_map_by_mouse_and_keyboard(tab: Page, pages: Path) -> None:
    opened(tab, pages / "model.html")
    x, y = tab.run("(() => { const at = map.canvas.getBoundingClientRect(); return [at.left, at.top]; })()")
    middle = "(model.piece.offset[5] + model.piece.nbytes[5] / 2) * map.scale"
    tab.click(x + tab.run(middle), y + tab.run("map.top(0)") + 10)
    assert text(tab, ".fullname") == tab.run("model.tensors.name[model.piece.tensor[5]]")
    assert tab.run("document.getElementById('tip').hidden") is False
    tab.run("map.canvas.focus()")
    tab.press("ArrowRight")
    assert text(tab, ".fullname") == tab.run("model.tensors.name[model.piece.tensor[6]]")
    tab.press("ArrowDown")
    assert "__1_0.safetensors" in text(tab, "#details")
    everything = tab.run("map.to - map.from")
    tab.press("+")
    assert tab.run("map.to - map.from") == pytest.approx(everything / 2)
    tab.press("Enter")
    piece = "model.own[state.tensor][0]"
    assert tab.run(f"map.from <= model.piece.offset[{piece}] && map.to > model.piece.offset[{piece}]") is True
    assert tab.run(f"model.piece.nbytes[{piece}] * map.scale") > 100
    tab.press("0")
    assert tab.run("map.to - map.from") == everything


def test_the_list_by_keyboard(tab: Page, pages: Path) -> None:
    opened(tab, pages / "model.html")
    tab.run("list.host.focus()")
    for key in ("ArrowDown", "ArrowDown"):
        tab.press(key)
    assert text(tab, ".fullname") == seen(tab)[1]
    tab.press("End")
    tab.settle()
    active = "document.getElementById(list.host.getAttribute('aria-activedescendant')).querySelector('.n').title"
    assert text(tab, ".fullname") == tab.run(active)
    assert tab.run("list.host.scrollTop") > 0
    tab.run("[...document.querySelectorAll('#heads button')].find(b => b.innerText.startsWith('Size')).click()")
    tab.run("list.host.scrollTop = 0")
    tab.settle()
    assert "norm" in seen(tab)[0]  # float32 in a model of bfloat16


def test_hostile_names_are_text(tab: Page, pages: Path) -> None:
    opened(tab, pages / "hostile.html", colour="rank")
    assert tab.run("document.title") == "hostile · shardwise"
    assert tab.run("document.images.length") == 0
    assert tab.run("document.scripts.length") == 2
    names = seen(tab)
    assert HOSTILE[0] in names
    assert "a\\u202etxt.weight" in names
    for number in range(len(HOSTILE)):
        tab.run(f"choose({number})")
        tab.settle()
    assert tab.run("({}).polluted === undefined && document.images.length === 0") is True
    # The page runs no code but its own, even where markup gets in.
    tab.run("document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"document.title = 1\">')")
    tab.run(
        "document.body.append(Object.assign(document.createElement('script'), {textContent: 'document.title = 2'}))"
    )
    tab.settle()
    assert tab.run("document.title") == "hostile · shardwise"


def test_what_changed_is_shown_by_layer(tab: Page, pages: Path) -> None:
    opened(tab, pages / "change.html")
    assert text(tab, "#changehead").endswith("6 changed, 6 equal")
    rows = tab.run("[...document.querySelectorAll('.layer')].map(row => row.innerText.split('\\n'))")
    assert [row[0].split() for row in rows] == [[part, f"{part[0]}.{i}"] for part in ("unet", "vae") for i in range(6)]
    assert [row[-2] for row in rows] == ["equal", "0.250"] * 6
    assert "0.1 to 1" in text(tab, "#legend")
    tab.run("document.querySelectorAll('.layer')[3].click()")
    assert seen(tab) == ["u.3.w"]


@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_is_wider_than_the_window(width: int, tab: Page, pages: Path) -> None:
    for name in ("model", "hostile", "change"):
        opened(tab, pages / f"{name}.html", width=width)
        tab.run("choose(0)")
        tab.settle()
        assert tab.run("document.documentElement.scrollWidth") <= width, name


@pytest.mark.slow
def test_forty_thousand_tensors(tab: Page, tmp_path: Path, record_property: pytest.RecordProperty) -> None:
    names = [
        f"model.layers.{layer}.mlp.experts.{expert}.up_proj.weight" for layer in range(100) for expert in range(400)
    ]
    write_model(tmp_path / "model.safetensors", [(name, "BF16", (1024, 512)) for name in names])
    write_page(tmp_path, tmp_path / "page.html")
    opened(tab, tmp_path / "page.html")
    assert text(tab, "#count") == "40,000 tensors"
    assert tab.run("document.querySelectorAll('*').length") < 1000
    milliseconds = int(tab.run("document.documentElement.dataset.ready"))
    record_property("milliseconds", milliseconds)
    print(f"40,000 tensors were ready after {milliseconds} ms by the page's own clock")
    tab.run("search('layers.73.mlp.experts.311.')")
    assert seen(tab) == ["model.layers.73.mlp.experts.311.up_proj.weight"]
