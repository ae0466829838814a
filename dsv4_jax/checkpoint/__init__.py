"""Checkpoints of other programs: Hugging Face folders, read and written."""

from dsv4_jax.checkpoint.exporting import convert, save
from dsv4_jax.checkpoint.files import CheckpointError
from dsv4_jax.checkpoint.huggingface import load_checkpoint, load_params, read_config
from dsv4_jax.checkpoint.storage import inventory

__all__ = ["CheckpointError", "convert", "inventory", "load_checkpoint", "load_params", "read_config", "save"]
