"""A run of the model: its request, the forward pass, and gradients."""
