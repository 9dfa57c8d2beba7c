#!/usr/bin/env bash
# An environment with the peers that the tests do without. Then: .peers/bin/python -m benchmarks
set -euo pipefail
cd "$(dirname "$0")/.."
python3 -m venv .peers
.peers/bin/pip install -c constraints.txt -e '.[parity]'
# TransformerLens and nnsight beside the versions above, which their own bounds may not name yet.
.peers/bin/pip install -c constraints.txt 'transformer-lens==4.3.*' 'nnsight>=0.8'
# For training; it requires other versions of what is above, and its trainers import no more than this.
.peers/bin/pip install --no-deps dictionary-learning==0.1.0
# DeepMind's gemma requires kauldron, which requires Google's cloud clients: only what the model itself imports.
.peers/bin/pip install -c constraints.txt tensorflow-cpu tensorboard chex grain immutabledict jaxtyping lark mediapy \
    ml_collections portpicker sentencepiece tabulate treescope typeguard
.peers/bin/pip install --no-deps 'gemma==3.3.*' 'kauldron==1.4.*' clu tensorflow_datasets
