"""Reads corpora and their annotations, and makes prepared datasets of them."""
