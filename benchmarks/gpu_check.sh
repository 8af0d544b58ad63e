#!/usr/bin/env bash
# Every GPU test and the GPU benchmarks, in under 8 minutes, on one GPU, with Python, torch, transformers, cupy, psutil, tqdm,
# orjson and pytest. Nothing is installed: what the machine lacks may lie as wheels in $WHEELS. Results also go to $OUT [a new
# folder].
#   bash benchmarks/gpu_check.sh [words for pytest]
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
OUT=${OUT:-$(mktemp -d /tmp/gpu-check.XXXX)}
mkdir -p "$OUT"

# The checkout is the package farspan, whatever its folder is called.
packages=$(mktemp -d)
trap 'rm -rf "$packages"' EXIT
ln -s "$PWD" "$packages/farspan"
for wheel in ${WHEELS:+"$WHEELS"/*.whl}; do
    "$python" -m zipfile -e "$wheel" "$packages"
done
export PYTHONPATH="$packages${PYTHONPATH:+:$PYTHONPATH}"
export OMP_NUM_THREADS=2 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1

{
    nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
    "$python" - <<'PY'
import sys
import torch, transformers
from farspan.comm.nccl import load
import cupy
print("python", sys.version.split()[0], "torch", torch.__version__, "transformers", transformers.__version__,
      "cupy", cupy.__version__, "NCCL", load().get_version(), "(torch's:", torch.cuda.nccl.version(), ")")
PY
} 2>&1 | tee "$OUT/machine.txt"

status=0
two=$("$python" -c 'import xdist' 2>/dev/null && echo "-n 2 --dist loadfile") # half the time, where pytest-xdist is there
timeout 340 "$python" -m pytest -q -m gpu -p no:cacheprovider --durations=10 --maxfail=8 $two tests/gpu "$@" 2>&1 |
    tee "$OUT/tests.txt" || status=1
timeout 120 "$python" benchmarks/gpu.py --out "$OUT/benchmarks.json" 2>&1 | tee "$OUT/benchmarks.txt" || status=1
echo "results in $OUT; $([ $status = 0 ] && echo all passed || echo SOMETHING FAILED)"
exit $status
