"""Compile quickly: most of the suite's time would go to optimising programs that run once.

Processes that the tests start do not see this, so that the command line holds parity with code as users run it.
"""

import jax

jax.config.update("jax_disable_most_optimizations", True)
