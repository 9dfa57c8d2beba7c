"""Searches of a corpus: what is read, what is counted on the device, what is found, and a search on disk."""
