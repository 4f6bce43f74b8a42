"""The decoder on one device: nothing here knows of a process group."""

from pangu.model.generate import generate
from pangu.model.init import init_weights
from pangu.model.transformer import Transformer

__all__ = ["Transformer", "generate", "init_weights"]
