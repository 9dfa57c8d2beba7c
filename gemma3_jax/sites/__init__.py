"""The sites that can be captured or edited, and their names."""
