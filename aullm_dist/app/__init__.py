"""Serves a page on this machine alone, on which a model is tried on a clip."""
