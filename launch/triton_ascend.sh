#!/usr/bin/env bash
# Compile the Triton kernels for Ascend, as far as that goes without CANN, in a virtual environment of its own:
# triton-ascend is a package `triton` and cannot live beside the other one. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
log=$(mktemp)
trap 'rm -f "$log"' EXIT
if bash -euo pipefail -c '
    source launch/environment.sh
    environment .venv-triton-ascend "[test]"
    # The last three triton-ascend imports without asking for them.
    pip install --quiet "triton-ascend==3.2.*" "ascendnpu-ir==1.2.*" pybind11 attrs scipy
' 2> "$log"; then
    OMP_NUM_THREADS=1 TRITON_INTERPRET=0 .venv-triton-ascend/bin/pytest tests/kernels/test_triton_ascend.py "$@"
else
    echo "SKIPPED: Triton kernels for Ascend. triton-ascend and ascendnpu-ir cannot be installed here:" >&2
    grep -i error "$log" >&2 || tail -n 3 "$log" >&2
fi
