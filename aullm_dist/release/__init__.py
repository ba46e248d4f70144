"""Releases: a trained model in a folder that others load, its card, and its verification."""
