"""The files of dictionaries: one module for each format, with `read` and, if it can be written, `write`."""
