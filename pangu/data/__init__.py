"""From text to batches: corpora, tokenized datasets, mixtures, packing and the resumable loader."""
