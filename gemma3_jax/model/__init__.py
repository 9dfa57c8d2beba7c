"""The equations of Gemma 3, the layouts of its parameters, and the scan over layers."""
