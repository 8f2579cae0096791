"""The page about a checkpoint: what it holds, that it is one file and harmless, and where it is not written."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.ops.checkpoints import engine, model, optimizer, saved
from tests.ops.damaged import gpt2, save_dcp
from tests.ops.pages import HOSTILE, data_of, write_model

from shardwise.cli import main
from shardwise.disk.storage import LocalStorage
from shardwise.errors import MisuseError
from shardwise.ops.inspect import inspect, writer_of
from shardwise.ops.modules import layer_of, module_of
from shardwise.ops.page import ADDED, ANOTHER, CHANGED, DIFFERS, EQUAL, UNKNOWN, write_page

EXPORT = "model/consolidated/model.safetensors"


def columns(data: dict[str, dict[str, list[object]]], table: str) -> list[dict[str, object]]:
    """The rows of a table that is kept in columns."""
    found = data[table]
    return [dict(zip(found, row, strict=True)) for row in zip(*found.values(), strict=True)]


def test_every_tensor_is_in_its_place_with_its_digest(tmp_path: Path) -> None:
    directory = saved(tmp_path / "run")
    report = write_page(tmp_path / "run", tmp_path / "page.html")
    assert (report.path, report.tensors, report.nbytes) == (directory, 12, report.html.stat().st_size)
    data = data_of(report.html)
    names = data["tensors"]["name"]
    paths = [file[0] for file in data["files"]]
    places = {names[piece["tensor"]]: piece for piece in columns(data, "pieces")}
    recorded = {t["name"]: t for t in json.loads((directory / "manifest.json").read_text())["tensors"]}
    assert places.keys() == recorded.keys() == set(names)
    for name, piece in places.items():
        [[file, offset, nbytes, _, _, crc]] = recorded[name]["chunks"]
        assert (paths[piece["file"]], piece["offset"], piece["nbytes"], piece["crc"]) == (
            file,
            offset,
            nbytes,
            int(crc, 16),
        )
    big = (directory / EXPORT).read_bytes()[places["big"]["offset"] :][: places["big"]["nbytes"]]
    assert big == bytes(load_file(directory / EXPORT)["big"].numpy().tobytes())
    writers = {file[0]: file[4] for file in data["files"]}
    assert writers["optim/shard-00001-optim-00001-of-00001.safetensors"] == "rank 0"
    assert writers[EXPORT] is None
    assert ["Ranks", "1"] in data["facts"]


def test_what_is_not_known_is_not_there(tmp_path: Path) -> None:
    save_file({"w": torch.ones(2)}, tmp_path / "shard-00002-model-00001-of-00001.safetensors")
    data = data_of(write_page(tmp_path, tmp_path / "page.html").html)
    assert data["manifest"] is False
    assert data["tensors"]["crc"] == data["pieces"]["crc"] == [None]
    assert data["change"] is None
    assert dict(data["facts"])["Written by"] == "not recorded"
    # How many ranks there were is not known, and with it whose the shard is.
    [file] = [file for file in data["files"] if file[0].startswith("shard")]
    assert file[4] == "shard 2"


def test_dcp_and_torch_files_have_places(tmp_path: Path) -> None:
    save_dcp(gpt2().state_dict(), tmp_path / "dcp")
    data = data_of(write_page(tmp_path / "dcp", tmp_path / "dcp.html").html)
    assert {file[0]: file[4] for file in data["files"]} == {".metadata": None, "__0_0.distcp": "rank 0"}
    assert len(data["pieces"]["tensor"]) == len(data["tensors"]["name"])
    torch.save({"w": torch.arange(6.0)}, tmp_path / "pytorch_model.bin")
    data = data_of(write_page(tmp_path / "pytorch_model.bin", tmp_path / "bin.html").html)
    [piece] = columns(data, "pieces")
    raw = (tmp_path / "pytorch_model.bin").read_bytes()[piece["offset"] :][: piece["nbytes"]]  # type: ignore[index,misc]
    assert raw == torch.arange(6.0).numpy().tobytes()


def test_a_pipelines_models_are_told_apart(tmp_path: Path) -> None:
    for name in ("unet", "vae"):
        write_model(tmp_path / name / "diffusion_pytorch_model.safetensors", [("w.weight", "F32", (2,))])
    data = data_of(write_page(tmp_path, tmp_path / "page.html").html)
    assert data["components"] == ["unet", "vae"]
    assert data["tensors"]["component"] == [0, 1]


def test_formats_are_told_by_content(tmp_path: Path) -> None:
    write_model(tmp_path / "weights.dat", [("w", "F32", (2,))])
    torch.save({"v": torch.ones(3)}, tmp_path / "weights.model")
    (tmp_path / "model-q4.bin").write_bytes(b"GGUF" + bytes(100))
    (tmp_path / "optimizer.pt").write_bytes((tmp_path / "weights.model").read_bytes())
    found = inspect(tmp_path)
    assert {tensor.spec.name for tensor in found.tensors} == {"w", "v"}
    formats = {file.path: file.format for file in found.files}
    assert formats["weights.dat"] == "safetensors file"
    assert formats["model-q4.bin"] == "GGUF file (llama.cpp)"
    assert dict(found.unread).keys() == {"model-q4.bin", "optimizer.pt"}


class _Elements(HTMLParser):
    """The elements of a page, as HTML has them."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def test_names_are_data_and_nothing_is_fetched(tmp_path: Path) -> None:
    directory = tmp_path / "<b onclick=x>&"
    write_model(directory / "model.safetensors", [(name, "U8", (1,)) for name in HOSTILE])
    (directory / "config.json").write_text('{"transformers_version": "</script><script>1"}')
    page = write_page(directory, tmp_path / "page.html").html
    data = data_of(page)
    assert set(data["tensors"]["name"]) == set(HOSTILE)
    assert "</script><script>1" in dict(data["facts"])["Written by"]
    elements = _Elements()
    elements.feed(page.read_text())
    plain = _Elements()
    write_model(tmp_path / "plain" / "model.safetensors", [("w", "U8", (1,))])
    plain.feed(write_page(tmp_path / "plain", tmp_path / "plain.html").html.read_text())
    assert [tag for tag, _ in elements.found] == [tag for tag, _ in plain.found]
    fetching = {"src", "href", "action", "srcset", "data", "poster"}
    assert not [each for each in elements.found if fetching & each[1].keys()]
    assert not re.search(r"@import|url\(|fetch\(|XMLHttpRequest|import\(|eval\(|innerHTML", page.read_text())


def test_the_policy_names_this_script_and_style_and_no_others(tmp_path: Path) -> None:
    write_model(tmp_path / "model.safetensors", [("w", "U8", (1,))])
    text = write_page(tmp_path, tmp_path / "page.html").html.read_text()
    [policy] = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', text)
    assert policy.startswith("default-src 'none'; ")
    assert "unsafe" not in policy
    for content in (text.split("<style>")[1].split("</style>")[0], text.split("<script>")[1].split("</script>")[0]):
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in policy


def test_what_changed(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    same, big = torch.ones(3), torch.full((4,), 2.0)
    for place, more in (
        (old, {"gone": torch.ones(3), "shape": torch.ones(2)}),
        (new, {"added": torch.ones(3), "shape": torch.ones(5)}),
    ):
        place.mkdir()
        tensors = {"same": same, "changed": big * (1.0 if place is old else 1.5), "zero": same * float(place is new)}
        save_file({**tensors, **more}, place / "model.safetensors")
    data = data_of(write_page(new, tmp_path / "page.html", against=old).html)
    change = data["change"]
    statuses = dict(zip(data["tensors"]["name"], change["status"], strict=True))
    assert statuses == {"same": EQUAL, "changed": CHANGED, "zero": CHANGED, "added": ADDED, "shape": ANOTHER}
    rows = {data["tensors"]["name"][t]: row for row, t in enumerate(change["tensor"])}
    assert change["relative"][rows["changed"]] == pytest.approx(0.5)
    assert (change["largest"][rows["changed"]], change["elements"][rows["changed"]]) == (1.0, 4)
    assert change["relative"][rows["zero"]] == "infinite"
    assert change["was"][rows["shape"]] == "F32 [2]"
    assert change["gone"] == [["model", "gone"]]
    quick = data_of(write_page(new, tmp_path / "page.html", against=old, values=False).html)
    statuses = dict(zip(quick["tensors"]["name"], quick["change"]["status"], strict=True))
    assert statuses["same"] == statuses["changed"] == UNKNOWN


def test_digests_are_enough_between_checkpoints(tmp_path: Path) -> None:
    first = saved(tmp_path / "a")
    net = model()
    optimizer(net)  # whose step the first has taken too
    with torch.no_grad():
        net.small.add_(1.0)
    with engine(tmp_path / "b") as made:
        second = made.save(0, 1, net)
    assert second is not None
    data = data_of(write_page(second, tmp_path / "page.html", against=first, values=False).html)
    statuses = dict(zip(data["tensors"]["name"], data["change"]["status"], strict=True))
    assert statuses == {"big": EQUAL, "empty": EQUAL, "small": DIFFERS}
    assert ["optim", "state.big.exp_avg"] in data["change"]["gone"]


def test_only_a_page_is_replaced(tmp_path: Path) -> None:
    write_model(tmp_path / "model" / "model.safetensors", [("w", "U8", (1,))])
    weights = tmp_path / "model" / "model.safetensors"
    content = weights.read_bytes()
    for place, why in ((weights, "would replace a file"), (tmp_path, "where a directory is")):
        with pytest.raises(MisuseError, match=why):
            write_page(tmp_path / "model", place)
    assert weights.read_bytes() == content
    for _ in range(2):
        write_page(tmp_path / "model", tmp_path / "page.html")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "page.html"]
    with pytest.raises(MisuseError, match="does not exist"):
        write_page(tmp_path / "model", tmp_path / "nowhere" / "page.html")


class Interrupted(LocalStorage):
    def rename(self, source: Path, target: Path) -> None:
        raise KeyboardInterrupt


def test_an_interrupted_page_leaves_nothing(tmp_path: Path) -> None:
    write_model(tmp_path / "model" / "model.safetensors", [("w", "U8", (1,))])
    with pytest.raises(KeyboardInterrupt):
        write_page(tmp_path / "model", tmp_path / "page.html", storage=Interrupted())
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_checkpoint_gets_no_file_that_its_manifest_lacks(tmp_path: Path) -> None:
    directory = saved(tmp_path)
    before = sorted(directory.rglob("*"))
    with pytest.raises(MisuseError, match="the place is in the checkpoint"):
        write_page(directory, directory / "model" / "page.html")
    assert sorted(directory.rglob("*")) == before


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved(tmp_path / "run", (1, 2))
    page, old = str(tmp_path / "page.html"), str(tmp_path / "run" / "epoch_0_step_1")
    assert main(["inspect", str(tmp_path / "run"), "--html", page, "--against", old]) == 0
    assert "12 tensors" in capsys.readouterr().out
    assert main(["inspect", str(tmp_path / "run"), "--html", page, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tensors"] == 12
    assert main(["inspect", old, "--against", old]) == 2
    assert main(["inspect", old, old, "--html", page]) == 2


def test_who_wrote_on_which_topology_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_dcp(gpt2().state_dict(), tmp_path / "dcp")
    assert main(["inspect", str(tmp_path / "dcp")]) == 0
    out = capsys.readouterr().out
    assert "ranks     not recorded; writers by the files' names: 1" in out
    saved(tmp_path / "run")
    assert main(["inspect", str(tmp_path / "run")]) == 0
    out = capsys.readouterr().out
    assert "ranks     1\n" in out
    assert "saved by  shardwise " in out


def test_modules_and_formats_are_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = [f"model.layers.{layer}.mlp.{part}.weight" for layer in range(3) for part in ("up", "down")]
    write_model(tmp_path / "model.safetensors", [(name, "BF16", (10, 10)) for name in names])
    (tmp_path / "config.json").write_text('{"transformers_version": "5.13.0"}')
    assert main(["inspect", str(tmp_path)]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["model.layers.*.mlp", "600", "1.20", "kB", "3", "layers"] in lines
    assert ["saved", "by", "transformers", "5.13.0", "(config.json)"] in lines
    assert ["model.safetensors", str((tmp_path / "model.safetensors").stat().st_size), "safetensors", "file"] in [
        [line[0], line[1].replace(",", ""), *line[2:4]] for line in lines if len(line) > 3
    ]


def test_a_page_loads_no_torch(tmp_path: Path) -> None:
    saved(tmp_path / "run")
    code = (
        "import sys; from shardwise.cli import main\n"
        f"main(['inspect', {str(tmp_path / 'run')!r}, '--html', {str(tmp_path / 'page.html')!r}])\n"
        "print([name for name in ('torch', 'numpy', 'transformers') if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stderr.strip() == "[]"


@pytest.mark.parametrize(
    ("name", "module", "layer"),
    [
        ("w", "", ""),
        ("lm_head.weight", "lm_head", "lm_head"),
        ("model.layers.7.mlp.up_proj.weight", "model.layers.*.mlp", "model.layers.7"),
        ("h.7.weight", "h.*", "h.7"),
        ("a.b.c.d.e.weight", "a.b.c", "a.b.c"),
        ("state.lm_head.weight.exp_avg", "state.lm_head", "state.lm_head"),
        ("state.h.7.mlp.weight.step", "state.h.*.mlp", "state.h.7"),
    ],
)
def test_modules_and_layers_by_name(name: str, module: str, layer: str) -> None:
    assert (module_of(name), layer_of(name)) == (module, layer)


@pytest.mark.parametrize(
    ("path", "ranks", "writer"),
    [
        ("optim/shard-00003-optim-00001-of-00001.safetensors", 4, "rank 2"),
        ("shard-00007-model-00001-of-00001.safetensors", 4, "rank 2"),  # a further piece of one tensor
        ("shard-00007-model-00001-of-00001.safetensors", None, "shard 7"),
        ("shard-00000-model-00001-of-00001.safetensors", 4, "shard 0"),
        ("model/__12_0.distcp", None, "rank 12"),
        ("model-00001-of-00002.safetensors", 4, None),
    ],
)
def test_writers_by_the_names_of_files(path: str, ranks: int | None, writer: str | None) -> None:
    assert writer_of(path, ranks) == writer
