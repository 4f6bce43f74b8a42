"""Pangu: an Ascend-first training framework for dense large language models."""

import os

# An installed torch_npu is otherwise loaded by `import torch` itself, which then fails on machines without CANN.
# `pangu.device.select` loads it when it is the device to train on.
os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")

__version__ = "0.1.0"
