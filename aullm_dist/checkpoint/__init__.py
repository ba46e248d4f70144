"""Saves and loads checkpoints, each of them complete and verified, or not there."""
