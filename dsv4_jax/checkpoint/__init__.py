"""Checkpoints of other programs: Hugging Face folders, read and written."""

from dsv4_jax.checkpoint.files import CheckpointError
from dsv4_jax.checkpoint.huggingface import load_checkpoint, load_params, read_config, save

__all__ = ["CheckpointError", "load_checkpoint", "load_params", "read_config", "save"]
