#!/bin/bash
# Harvest on a Slurm cluster: sbatch examples/harvest/slurm.sh MODEL CORPUS OUT SITE
#
#   sbatch --array=0-7 examples/harvest/slurm.sh google/gemma-3-4b-pt corpus.jsonl /shared/store 'blocks.{9,17}.hook_out'
#
# Each task does its part of the units; `--part environment` reads the number of the task. OUT is a folder that all nodes
# see, or s3://bucket/folder. A task that is killed is requeued, and does the units that have no file yet. Run the same
# command again when all tasks have ended: it does what is left, and says what the store has.
#SBATCH --job-name=harvest
#SBATCH --array=0-3
#SBATCH --ntasks=1
#SBATCH --gpus-per-task=1
#SBATCH --cpus-per-task=8
#SBATCH --mem=64G
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --output=harvest-%A-%a.log
set -euo pipefail

if [ $# -ne 4 ]; then
    echo "usage: sbatch slurm.sh MODEL CORPUS OUT SITE" >&2
    exit 2
fi
# All tasks read the same checkpoint: download it before, with `hf download MODEL`, where nodes have no network.
exec gemma3-jax harvest run "$1" "$2" "$3" --site "$4" --cast bfloat16 --part environment
