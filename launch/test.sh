#!/usr/bin/env bash
# Lint, type-check and test in a virtual environment of its own. Arguments go to pytest.
# PANGU_TEST_SLOW=1 also runs the long tests and those on an emulated NPU.
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
    # transformers loads torch_npu wherever it is installed, which fails without CANN: hence an environment of its own.
    environment .venv-ascend '[npu,test]'
    pytest -m ascend tests/device tests/doctor tests/kernels tests/parallel tests/train/test_emulated_npu.py
fi
