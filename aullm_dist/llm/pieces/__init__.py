"""Loads an LLM in pieces: built without storage, then filled weight by weight, each process with its share."""
