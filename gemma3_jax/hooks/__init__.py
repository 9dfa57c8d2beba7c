"""Interception of sites, edits, reductions, and the tracing of users' functions."""
