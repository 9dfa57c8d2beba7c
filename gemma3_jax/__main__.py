"""`python -m gemma3_jax` runs the `gemma3-jax` command."""

from gemma3_jax.cli.main import main

main()
