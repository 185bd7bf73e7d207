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
python3 -m pytest -q -p no:cacheprovider tests/test_ops_*.py tests/test_smooth.py tests/test_gpu.py 2>&1 |
  tee "$results/tests.txt" || tests=$?

# Reads and writes out of bounds, on the CUDA kernels' own tests against the reference.
if command -v compute-sanitizer >/dev/null; then
  compute-sanitizer --error-exitcode 1 python3 -m pytest -q -p no:cacheprovider tests/test_ops_corrupt.py \
    tests/test_ops_corrupt_patches.py tests/test_ops_votes.py -k "native-cuda and (reference or definition)" \
    >"$results/sanitizer.txt" 2>&1 || { tail -n 20 "$results/sanitizer.txt"; tests=1; }
else
  echo "compute-sanitizer is not installed: not run" | tee "$results/sanitizer.txt"
fi

# The table stands in table.json and table.txt, and is printed last. torch.compile takes seconds a row, so it is
# timed on the large sizes only. What matters most goes first: after five minutes, the rows so far are the table.
of() { printf "benchmarks/bench_%s.py " "$@"; }
rows=0
# shellcheck disable=SC2046 # one word a file
timeout -s INT 300 python3 -m pytest -q -p no:cacheprovider \
  $(of corrupt corrupt_patches votes recon_loss random_masks mask_tokens attack_steps certify attacks pretrain finetune) \
  -k "not compiled or ImageNet" --device cuda --results "$results/table.json" >"$results/benchmarks.txt" 2>&1 || rows=$?
if [ "$rows" = 124 ]; then
  echo "the benchmarks were stopped after five minutes: later rows are missing"
elif [ "$rows" != 0 ]; then
  tail -n 40 "$results/benchmarks.txt"
  tests=1
fi
cat "$results/table.txt"
tail -n 1 "$results/tests.txt"
exit "$tests"
