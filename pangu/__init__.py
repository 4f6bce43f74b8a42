"""Pangu: an Ascend-first training framework for dense large language models."""

__version__ = "0.1.0"
