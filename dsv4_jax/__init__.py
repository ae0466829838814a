"""DeepSeek-V4 in JAX: the architecture exact, from a config to a trained model.

    import dsv4_jax as dsv4
    model = dsv4.create("nano", 0)
    out = model.forward(model.params, tokens)  # out.logits [B, S, V]

Names are imported when they are first used, so that `dsv4 info` answers without starting JAX.
"""

import importlib
from typing import Any

_FACE = {
    "Model": "dsv4_jax.api",
    "create": "dsv4_jax.api",
    "load": "dsv4_jax.api",
    "forward": "dsv4_jax.model",
    "trace": "dsv4_jax.analysis.trace",
    "Output": "dsv4_jax.model",
    "preset": "dsv4_jax.presets",
    "article_plan": "dsv4_jax.presets",
    "DeepseekV4Config": "dsv4_jax.config",
    "config_from_json": "dsv4_jax.config_json",
    "load_tokenizer": "dsv4_jax.tokenizer",
}
__all__ = sorted(_FACE)
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """The public name, imported now."""
    if name not in _FACE:
        raise AttributeError(f"module 'dsv4_jax' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(_FACE[name]), name)
