"""``fx-cache explain``: models made of descriptions, without weights; and one clear error for what cannot be made."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from fx_cache.cli import app
from fx_cache.debug.specimen import SAMPLES, describe, make_specimen
from tests.selection import few

pytestmark = pytest.mark.filterwarnings("ignore")


def run(*args: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["explain", *args])
    return result.exit_code, " ".join(result.output.replace("│", " ").split())


def explained(*args: str) -> dict:
    code, text = run(*args, "--json")
    assert code == 0, text
    return json.loads(text)


def test_a_class_by_name() -> None:
    code, text = run("DiTTransformer2DModel")
    assert code == 0
    assert "stack transformer_blocks: 5 blocks" in text and text.endswith("cached")


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", few(["HiDreamImageTransformer2DModel", "WanAnimate2Transformer3DModel", "OmniGenTransformer2DModel"], 1)
)
def test_classes_in_several_graphs(name: str) -> None:
    found = explained(name)
    assert found["reason"] is None and found["graphs"] > 1


def test_a_real_configuration_is_looked_at_without_data(tmp_path: Path) -> None:
    config = {
        "_class_name": "DiTTransformer2DModel",
        "num_attention_heads": 16,
        "attention_head_dim": 72,
        "in_channels": 4,
        "out_channels": 8,
        "num_layers": 28,
        "sample_size": 32,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = explained("DiTTransformer2DModel", "--config", str(tmp_path / "config.json"), "--fn", "8", "--bn", "2")
    (stack,) = found["stacks"]
    assert (stack["blocks"], stack["span"], stack["streams"][0]["shape"][-1]) == (28, [8, 26], "1152")


def test_a_class_by_path_with_inputs(tmp_path: Path) -> None:
    described = {"x": {"shape": [1, 5, 8], "dtype": "float32"}, "t": {"values": [3.0], "dtype": "float32"}}
    (tmp_path / "inputs.json").write_text(json.dumps(described))
    (tmp_path / "config.json").write_text("{}")
    found = explained(
        "tests.test_specimen.Plain",
        "--inputs",
        str(tmp_path / "inputs.json"),
        "--config",
        str(tmp_path / "config.json"),
    )
    assert [s["name"] for s in found["stacks"]] == ["blocks"]


class PlainBlock(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = torch.nn.LayerNorm(8), torch.nn.Linear(8, 16), torch.nn.Linear(16, 8)

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.nn.functional.gelu(self.up(self.norm(x) * t)))


class Plain(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList(PlainBlock() for _ in range(4))

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x, torch.sin(t)[:, None, None])
        return x


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["Nonsense"], "got nothing of that name in diffusers"),
        (["no.such.module.Class"], "expected a module that can be imported"),
        (["torch.nn.Linear"], "expected a description of its arguments (input)"),
        (["DiTTransformer2DModel", "--config", "missing.json"], "expected a JSON object"),
        (["DiTTransformer2DModel", "--scope", "all"], "option 'scope'"),
    ],
)
def test_what_cannot_be_explained(args: list[str], told: str) -> None:
    code, text = run(*args)
    assert code == 2 and told in text


def test_a_constructor_that_refuses(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"no_such_argument": 1}')
    code, text = run("DiTTransformer2DModel", "--config", str(tmp_path / "config.json"))
    assert code == 2 and "from its constructor" in text and "no_such_argument" in text


def test_a_description_gives_the_same_again() -> None:
    given = {"a": torch.tensor([1, 2]), "b": [torch.zeros(2, 3), None], "c": {3: (1, "x")}, "d": True}
    assert describe(given["a"]) == {"values": [1, 2], "dtype": "int64"}
    assert describe(given["b"]) == [{"shape": [2, 3], "dtype": "float32"}, None]
    sample = json.loads(SAMPLES.read_text())["DiTTransformer2DModel"]
    made = make_specimen(
        "DiTTransformer2DModel", sample["config"], {"x": describe(given["c"]), "y": describe(given["b"])}
    )
    assert made.inputs["x"] == {3: (1, "x")} and made.inputs["y"][0].shape == (2, 3)
