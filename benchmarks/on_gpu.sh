#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# On a CUDA machine without network: build the extension, run every test on the GPU, print the speed table.
# Needs torch, triton, timm, pybind11, scikit-build-core, cmake, ninja and a CUDA toolkit installed; what is missing of
# the pure-Python rest (tyro, pytest-benchmark) is taken from PYTHONPATH. Results go to $NIMFAST_RESULTS
# (default: benchmarks/results/gpu). Ends within 10 minutes on an H200.
set -euo pipefail
cd "$(dirname "$0")/.."
results=${NIMFAST_RESULTS:-benchmarks/results/gpu}
mkdir -p "$results"

NIMFAST_CUDA=ON python3 -m pip install --no-build-isolation --no-deps --no-index . >"$results/build.log" 2>&1 ||
  { tail -n 40 "$results/build.log"; exit 1; }
python3 -m nimfast.doctor | tee "$results/doctor.txt"

# The same tests as on a CPU: they run on every device present.
tests=0
python3 -m pytest -q -p no:cacheprovider tests/test_ops_noise.py tests/test_ops_corrupt.py tests/test_ops_votes.py \
  tests/test_smooth.py tests/test_gpu.py 2>&1 | tee "$results/tests.txt" || tests=$?

if command -v compute-sanitizer >/dev/null; then
  compute-sanitizer --error-exitcode 1 python3 -m pytest -q -p no:cacheprovider tests/test_ops_corrupt.py \
    tests/test_ops_votes.py -k "native-cuda and (reference or definition)" >"$results/sanitizer.txt" 2>&1 ||
    { tail -n 20 "$results/sanitizer.txt"; tests=1; }
fi

python3 -m pytest -q -p no:cacheprovider benchmarks --device cuda --results "$results/table.json" |
  tee "$results/table.txt"
exit "$tests"
