#!/usr/bin/env bash
# Lint, type-check and test in a virtual environment of its own. Arguments go to pytest.
# PANGU_TEST_SLOW=1 also runs the long tests, PANGU_TEST_ASCEND=1 those on an emulated NPU, both also the long ones there.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh
environment .venv-test '[dev]'
export OMP_NUM_THREADS=1 TORCH_DEVICE_BACKEND_AUTOLOAD=0
ruff check .
mypy
pytest -n 2 "$@"
if [ "${PANGU_TEST_SLOW:-0}" = 1 ]; then
    pytest -m slow
fi
if [ "${PANGU_TEST_ASCEND:-0}" = 1 ]; then
    # transformers loads torch_npu wherever it is installed, which fails without CANN: hence an environment of its own.
    environment .venv-ascend '[npu,test]'
    folders=(tests/device tests/doctor tests/kernels tests/train/test_emulated_npu.py)
    [ "${PANGU_TEST_SLOW:-0}" = 1 ] && folders+=(tests/parallel)
    pytest -m ascend "${folders[@]}"
fi
