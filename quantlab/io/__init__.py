"""Checkpoint layouts, tokenizers, data sets and the cache."""

from quantlab.io.checkpoint import Checkpoint, open_checkpoint
from quantlab.io.save import save_checkpoint

__all__ = ["Checkpoint", "open_checkpoint", "save_checkpoint"]
