"""Numerical kernels: matrix products and attention. This package does not depend on sites or hooks."""
