"""Harvest on a Ray cluster: one task for each part, each on a GPU of its own.

    pip install ray
    python examples/harvest/on_ray.py google/gemma-3-4b-pt corpus.jsonl s3://bucket/store 'blocks.9.hook_out' --parts 8
    python examples/harvest/on_ray.py google/gemma-3-270m corpus.txt store 'blocks.9.hook_out' --gpus 0

A task whose node is lost is started again on another one, and does the units that have no file yet. All nodes must
see corpus and store. The last line says what the store has, here of the shipped model and 160 texts:

    ActivationStore: 2,510 tokens of 160 documents, 1 of 1 units, 220 bytes a token
"""

import argparse

import ray

from gemma3_jax.harvest import ActivationStore


def harvest_part(model: str, corpus: str, out: str, site: str, part: tuple[int, int]) -> None:
    """Do one part of the units. JAX is imported in the task, where Ray shows it the task's GPU alone."""
    from gemma3_jax import HookedGemma3, reductions
    from gemma3_jax.harvest import harvest

    sites = {site: reductions.Cast("bfloat16")}
    harvest(HookedGemma3.from_pretrained(model), corpus, sites, out, part=part, progress=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("model", "corpus", "out", "site"):
        parser.add_argument(name)
    parser.add_argument("--parts", type=int, default=2)
    parser.add_argument("--gpus", type=float, default=1, help="GPUs of a task")
    arguments = parser.parse_args()
    ray.init()
    # Retries are for nodes that are lost; an error of the harvest itself ends the program.
    task = ray.remote(num_gpus=arguments.gpus, max_retries=100)(harvest_part)
    every = [
        task.remote(arguments.model, arguments.corpus, arguments.out, arguments.site, (number, arguments.parts))
        for number in range(arguments.parts)
    ]
    ray.get(every)
    print(repr(ActivationStore(arguments.out)).splitlines()[0])


if __name__ == "__main__":
    main()
