"""Compile quickly: most of the suite's time would go to optimising programs that run once.

Processes that the tests start do not see this, so that the command line holds parity with code as users run it. They
do inherit torch's one thread.
"""

import os

# Before torch is imported. Each test process has a core: torch's own threads would only wait for each other's.
os.environ["OMP_NUM_THREADS"] = "1"

import jax

jax.config.update("jax_disable_most_optimizations", True)
