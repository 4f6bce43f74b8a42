"""From text to token ids and back: a vocabulary balanced over domains, the files of it, and its training."""

from pangu.tokenizer.tokenizer import Tokenizer
from pangu.tokenizer.training import train
from pangu.tokenizer.transformers_files import save_for_transformers

__all__ = ["Tokenizer", "save_for_transformers", "train"]
