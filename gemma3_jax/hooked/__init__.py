"""`HookedGemma3`: the model for interactive use."""
