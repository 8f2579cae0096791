"""`convert` on what the tools themselves write, where they are installed; no environment of this repository has them.

Lightning's FSDP strategies take no CPU, so their directories are written by hand in `tests.ops.test_convert_hf`, as
their ``save_checkpoint`` does.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from tests.integrations.titan import make_assets, on_cpu
from tests.ops.damaged import save_dcp
from tests.ops.llamas import base, llama, opens_as
from transformers import LlamaForCausalLM

from shardwise.errors import MisuseError
from shardwise.ops.convert import convert

pytestmark = pytest.mark.slow


@pytest.mark.skipif(importlib.util.find_spec("lightning") is None, reason="Lightning is not installed")
def test_a_checkpoint_of_lightnings_trainer(tmp_path: Path) -> None:
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self, rate: float) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.net = llama(4)
            self.scale = torch.nn.Parameter(torch.ones(1))

        def training_step(self, tokens: torch.Tensor, number: int) -> torch.Tensor:
            loss: torch.Tensor = self.net(tokens, labels=tokens).loss * self.scale
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=self.hparams.rate)  # type: ignore[attr-defined]

    module = Module(0.01)
    trainer = lightning.Trainer(
        max_steps=3, accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=tmp_path / "run"
    )
    trainer.fit(module, torch.utils.data.DataLoader(torch.randint(32, (3, 8)), batch_size=1))
    [file] = (tmp_path / "run").rglob("*.ckpt")
    net = module.net.eval()
    config = base(tmp_path / "base", net)
    for source in (file, file.parent):
        report = convert(source, tmp_path / source.name / "out", "hf", config=config)
        assert opens_as(report.path, net)
        assert any("scale" in note and "optimizer_states" in note for note in report.notes)
    with pytest.raises(MisuseError, match="LightningModule"):
        convert(file, tmp_path / "out", "hf")
    with pytest.raises(MisuseError, match="known by number"):
        convert(file, tmp_path / "out", "shards", config=config)
    report = convert(file, tmp_path / "root", "shards", config=config, optimizer=False)
    assert report.path.name == "epoch_0_step_3"


@pytest.mark.skipif(importlib.util.find_spec("torchtitan") is None, reason="torchtitan is not installed")
def test_a_llama_of_torchtitan(tmp_path: Path) -> None:
    on_cpu()
    from torchtitan.models.common.attention import ScaledDotProductAttention
    from torchtitan.models.common.config_utils import make_gqa_config
    from torchtitan.models.llama3 import llama3_configs

    make_assets(tmp_path / "assets")
    torch.manual_seed(5)
    config = llama3_configs["debugmodel"](attn_backend="flex")
    for layer in config.layers:  # the only attention that the CPU has
        had = layer.attention
        init = {"weight": torch.nn.init.xavier_normal_}
        layer.attention = make_gqa_config(
            dim=had.dim, n_heads=had.n_heads, n_kv_heads=had.n_kv_heads, wqkv_param_init=init, rope=had.rope,
            wo_param_init=init, inner_attention=ScaledDotProductAttention.Config(), fuse_qkv=True,
        )  # fmt: skip
    model = config.build()
    model.init_states()
    optimizer = torch.optim.AdamW(model.parameters())
    tokens = torch.arange(32).reshape(1, 32)
    state = {**model.state_dict(), "optimizer": optimizer.state_dict(), "train_state": {"step": torch.tensor(7)}}
    source = save_dcp(state, tmp_path / "step-7")
    with pytest.raises(MisuseError, match="order of the rows of q and k"):
        convert(source, tmp_path / "out", "hf", config=tmp_path / "assets")
    report = convert(source, tmp_path / "out", "hf", config=tmp_path / "assets", rope="interleaved")
    with torch.no_grad():
        expected = model(tokens)
        found = LlamaForCausalLM.from_pretrained(report.path).eval()(tokens).logits
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)
