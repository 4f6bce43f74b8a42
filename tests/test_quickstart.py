"""The README's first command, as a new user runs it: a fresh clone, nothing installed."""

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

from pangu.data.indexed_dataset import IndexedDataset
from pangu.train.events import read_events

ROOT = Path(__file__).resolve().parent.parent
DOMAINS = ("english", "code")


def quickstart(clone: Path) -> str:
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    done = subprocess.run(
        ["bash", "launch/quickstart.sh"], cwd=clone, env=environment, capture_output=True, text=True, timeout=3600
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


def unigram_entropy(datasets: list[IndexedDataset], weights: list[float]) -> float:
    """Nats per token of the best model that ignores context, on the mixture trained on."""
    counts = np.stack([np.bincount(dataset.tokens, minlength=2**16) / dataset.num_tokens for dataset in datasets])
    shares = np.average(counts, axis=0, weights=weights)
    return float(-(shares[shares > 0] * np.log(shares[shares > 0])).sum())


@pytest.mark.slow
def test_quickstart_in_a_fresh_clone(tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
    quickstart(clone)
    run = clone / "runs" / "quickstart"
    events = read_events(run / "training")

    losses = [event for event in events if event["kind"] == "validation"][-1]["losses"]
    assert losses.keys() == set(DOMAINS)
    entropy = unigram_entropy([IndexedDataset(run / "data" / domain) for domain in DOMAINS], [0.5, 0.5])
    assert np.mean(list(losses.values())) <= 0.75 * entropy
    assert (run / "plots" / "loss.png").stat().st_size > 10_000

    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(run / "exported")
    tokenizer = transformers.AutoTokenizer.from_pretrained(run / "exported")
    prompt = tokenizer("def ", return_tensors="pt", return_token_type_ids=False)
    assert model.generate(**prompt, max_new_tokens=8, do_sample=False).shape[1] > prompt["input_ids"].shape[1]

    again = quickstart(clone)
    assert "skipped" in again
    assert read_events(run / "training") == events, "a finished run trains no further"
