"""Compile quickly: most of the suite's time would go to optimising programs that run once.

The command line's tests start processes without this, so that parity is also held by code as users run it.
"""

import os

QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {QUICK}".strip()
