"""What the README and the guide to inference show in Python runs as it stands there."""

import re
from pathlib import Path

import pytest
from support import TINY

from dsv4_jax.api import Model, create
from dsv4_jax.checkpoint import save
from dsv4_jax.config import CSA, HCA
from dsv4_jax.errors import UserError
from dsv4_jax.presets import preset
from dsv4_jax.tokenizer import ByteTokenizer

ROOT = Path(__file__).parents[1]
# One kind of layer: it compiles in half the time of nano.
SMALL = TINY.replace(
    num_hidden_layers=2, num_nextn_predict_layers=0, num_hash_layers=0, compress_ratios=(4, 4), layer_types=(CSA, CSA)
)


def python_blocks(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.slow
def test_the_python_block():
    [block] = python_blocks(ROOT / "README.md")
    assert block.count('"nano"') == 1
    tokenizer = ByteTokenizer()
    names = {"config": SMALL.replace(vocab_size=tokenizer.vocab_size)}
    *lines, generates = block.replace('"nano"', "config").strip().splitlines()
    exec("\n".join(lines), names)
    model = names["model"]
    assert names["out"].logits.shape == (1, 4, tokenizer.vocab_size)
    assert names["cache"].lengths.tolist() == [4]
    with pytest.raises(UserError, match="tokenizer"):
        exec(generates, names)
    names["model"] = Model(model.config, model.params, tokenizer)
    exec(generates, names)
    assert isinstance(names["text"], str)


@pytest.mark.slow
def test_the_blocks_of_the_guide_to_inference(tmp_path, monkeypatch, capsys):
    """On two layers of nano's widths, stored as the release is, in the folder that the guide names."""
    monkeypatch.chdir(tmp_path)
    tokenizer = ByteTokenizer()
    sizes = {"num_hidden_layers": 2, "num_hash_layers": 0, "compress_ratios": (4, 32, 0), "layer_types": (CSA, HCA)}
    config = preset("nano").replace(vocab_size=tokenizer.vocab_size, **sizes)
    save(tmp_path / "models" / "v4-flash", config, create(config).params, "released", "v4", tokenizer=tokenizer)
    names = {}
    for block in python_blocks(ROOT / "docs" / "inference.md"):
        exec(block.replace('mesh="expert=8"', "mesh=None"), names)  # this process has one device
    assert names["engine"].cache_format == "deployed"
    assert 1 <= names["answer"].accepted_length <= 3
    assert names["document"].hit.stored > 0  # the second time; what is before the last window is not computed again
    assert names["document"].hit.recomputed < names["document"].hit.tokens
    shown = capsys.readouterr().out.splitlines()
    assert any(line.startswith("0 ") for line in shown) and any(line.startswith("1 ") for line in shown)
