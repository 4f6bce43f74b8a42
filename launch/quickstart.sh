#!/usr/bin/env bash
# Everything from an empty machine to a trained, plotted, sampled and exported model on real text, on a CPU.
# Run it again after an interruption and it goes on where it stopped; delete RUN (default: runs/quickstart) to start over.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh
environment .venv ''
run=${RUN:-runs/quickstart}
corpus=$run/corpus data=$run/data tokenizer=$run/tokenizer/tokenizer.model
domains="english code"

done_before() { [ -e "$1" ] && echo "== $2: $1 is there, skipped"; }

done_before "$corpus" "Sample corpus" || {
    echo "== Sample corpus: the Python installation's own documentation and sources"
    pangu data sample --output "$corpus"
}
done_before "$tokenizer" "Tokenizer" || {
    echo "== Tokenizer: one vocabulary per domain, merged"
    pangu tokenizer train --output "$run/tokenizer" --vocab-size 8192 --domain english="$corpus/english.jsonl" --domain code="$corpus/code.jsonl"
}
for domain in $domains; do
    done_before "$data/$domain.idx" "Tokenized $domain" || {
        echo "== Tokenizing $domain"
        pangu data build "$corpus/$domain.jsonl" --output "$data/$domain" --domain "$domain" --tokenizer "$tokenizer" \
            --workers 2 --shuffle-seed 0 --validation-fraction 0.03
    }
done
echo "== Training"
pangu train quickstart --output "$run/training" --resume \
    --data.tokenizer "$tokenizer" \
    --data.domains.english.paths "[\"$data/english\"]" --data.domains.english.validation_paths "[\"$data/english.validation\"]" \
    --data.domains.code.paths "[\"$data/code\"]" --data.domains.code.validation_paths "[\"$data/code.validation\"]"
echo "== Plot"
pangu plot "$run/training" --output "$run/plots"
echo "== A sample"
pangu generate "$run/training" --prompt "def " --prompt "Return the " --max-new-tokens 60 --temperature 0.7 --top-p 0.9
done_before "$run/exported" "Export" || {
    echo "== Export for transformers"
    pangu export "$run/training" --output "$run/exported"
}
