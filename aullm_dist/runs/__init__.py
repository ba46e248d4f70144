"""Defines the run folder: where its files are, and how they are written and read."""
