#!/usr/bin/env bash
# An environment with the peers that the tests do without. Then: .peers/bin/python -m benchmarks
set -euo pipefail
cd "$(dirname "$0")/.."
python3 -m venv .peers
.peers/bin/pip install -c constraints.txt -e '.[parity]'
# TransformerLens and nnsight beside the versions above, which their own bounds may not name yet.
.peers/bin/pip install -c constraints.txt 'transformer-lens==4.3.*' 'nnsight>=0.8'
