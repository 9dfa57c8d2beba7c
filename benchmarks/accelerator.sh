#!/usr/bin/env bash
# Parity and speed on this machine's GPU or TPU, in a few minutes:
#     benchmarks/accelerator.sh NAME           for example h100 or v5e-1
# writes benchmarks/results/NAME.json, parity reports in benchmarks/results/parity, and docs/benchmarks.md.
# It makes an environment in .accelerator. PYTHON=python3 takes an environment that has jax for the device, and torch.
set -euo pipefail
cd "$(dirname "$0")/.."
name=${1:?usage: benchmarks/accelerator.sh NAME, for example h100 or v5e-1}
python=${PYTHON:-.accelerator/bin/python}
if [ -z "${PYTHON:-}" ]; then
    command -v nvidia-smi >/dev/null && device=cuda || device=tpu
    python3 -m venv .accelerator
    "$python" -m pip install --quiet -c constraints.txt -e ".[parity,$device]"
fi
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-$(mktemp -d)}"
# torch has the same GPU, so JAX must not take all of its memory.
export XLA_PYTHON_CLIENT_PREALLOCATE=false
"$python" - <<'END'
import sys
import jax
if jax.default_backend() == "cpu":
    sys.exit("JAX finds no GPU or TPU here; install jax[cuda12] or jax[tpu], or set PYTHON to a Python that has it")
END

checkpoint=$(mktemp -d)
trap 'rm -rf "$checkpoint"' EXIT
"$python" -m benchmarks.checkpoint 270m "$checkpoint"
mkdir -p benchmarks/results/parity
failed=0
for dtype in float32 bfloat16; do
    "$python" -m gemma3_jax parity "$checkpoint" --dtype "$dtype" --tokens 64 \
        --json "benchmarks/results/parity/$name-$dtype.json" || failed=1
done
"$python" -m benchmarks --size 270m --only forward,decode,capture --rounds 3 --json "benchmarks/results/$name.json"
"$python" -m benchmarks --page
exit $failed
