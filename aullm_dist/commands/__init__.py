"""Holds the `aullm-dist` commands: one module each, with `add_arguments` and `run`."""
