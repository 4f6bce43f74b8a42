import os

# Before torch is imported: small tensors only get slower with more threads, and bits must not depend on their number.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Read when triton is imported, by whatever test comes first.
os.environ.setdefault("TRITON_INTERPRET", "1")
