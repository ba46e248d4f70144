"""Writes, loads and verifies releases: a trained model in a folder that others load, with its card."""
