"""Convert Hugging Face checkpoints to parameters, and export parameters to checkpoints."""
