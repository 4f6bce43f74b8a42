"""Models to and from Hugging Face folders: `export` writes one, `import_` reads one."""

from pangu.convert.huggingface import ImportedModel, export, import_

__all__ = ["ImportedModel", "export", "import_"]
