"""What the README shows in Python runs as it stands there."""

import re
from pathlib import Path

import pytest
from support import TINY

from dsv4_jax.api import Model
from dsv4_jax.config import CSA
from dsv4_jax.errors import UserError
from dsv4_jax.tokenizer import ByteTokenizer

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
# One kind of layer: it compiles in half the time of nano.
SMALL = TINY.replace(
    num_hidden_layers=2, num_nextn_predict_layers=0, num_hash_layers=0, compress_ratios=(4, 4), layer_types=(CSA, CSA)
)


@pytest.mark.slow
def test_the_python_block():
    [block] = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
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
