"""Corpora on disk, their annotations, and the prepared datasets made from them."""
