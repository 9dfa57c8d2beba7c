"""Training of dictionaries: the loop, a step of it, batches and sites, the scale of the values, and a run on disk."""
