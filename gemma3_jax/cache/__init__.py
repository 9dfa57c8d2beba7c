"""The captured activations of a run, and decompositions of the residual stream."""
