"""Takes the pictures of the page that `shardwise inspect --html` writes, as ``docs/img/page-light.png`` and its like.

A small model is trained for some steps, and the page shows what has changed in between. Needs chromium.

python -m tools.page_pictures
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from tests.docs.pages import ROOT
from tests.support.browser import browser
from transformers import LlamaConfig, LlamaForCausalLM

from shardwise import CheckpointingConfig
from shardwise.ops.page import write_page

#: Where the run seems to be.
_HOME = "/home/you/run"
_CHOSEN = "tensor=model.layers.9.mlp.up_proj.weight"
#: Name -> width, height, dark, what is behind the # of the address.
_PICTURES = {
    "page-light": (1280, 900, False, "colour=module&tensor=lm_head.weight"),
    "page-dark": (1280, 900, True, _CHOSEN),
}


def trained(root: Path) -> tuple[Path, Path]:
    """Two checkpoints of a run."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=12,
        num_attention_heads=6,
        num_key_value_heads=2,
        vocab_size=3000,
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    checkpointer = CheckpointingConfig(
        checkpoint_dir=str(root), save_consolidated="every", max_file_bytes=3_000_000
    ).build()
    found = []
    for step in range(1, 9):
        tokens = torch.randint(3000, (2, 64))
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 4 == 0:
            found.append(
                checkpointer.save(0, 100 * step // 4, model, optimizer, metrics={"loss": float(loss.detach())})
            )
    checkpointer.close()
    first, second = found
    assert first is not None
    assert second is not None
    return first, second


def main() -> None:
    """Write the pictures."""
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory).resolve()
        first, second = trained(folder / "run")
        page = write_page(second, folder / "page.html", against=first).html
        page.write_text(page.read_text().replace(str(folder / "run"), _HOME))
        with browser(folder / "profile") as tab:
            for name, (width, height, dark, state) in _PICTURES.items():
                tab.look(width, height, dark=dark)
                tab.open(page, state)
                tab.screenshot(ROOT / "docs" / "img" / f"{name}.png")


if __name__ == "__main__":
    main()
