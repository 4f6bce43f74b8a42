"""Train-like reading of the dataset PREFIX under a limit on what the process may allocate; see test_loader.py.

Prints the tokens read and by how many bytes the process's own (anonymous) memory grew.
"""

import resource
import sys

from pangu.config import Config, DataConfig, DomainConfig, ModelConfig, PhaseConfig, TrainConfig
from pangu.data.loader import Loader
from pangu.data.schedule import Schedule

ALLOWED = 32 << 20


def status(field: str) -> int:
    """Bytes, from /proc/self/status."""
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


config = Config(
    model=ModelConfig(vocab_size=16, hidden_size=8, num_layers=1, num_attention_heads=2, intermediate_size=8),
    data=DataConfig(domains={"huge": DomainConfig(paths=(sys.argv[1],))}, prefetch=0),
    phases=(PhaseConfig(name="p", sequence_length=4096, batch_size=100, learning_rate=1.0),),
    train=TrainConfig(steps=20),
)
limit = status("VmData") + ALLOWED
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
before = status("RssAnon")
loader = Loader(config, Schedule(config))
tokens = sum(len(batch.tokens) for step in range(20) for batch in loader.batches(step))
print(tokens, status("RssAnon") - before)
