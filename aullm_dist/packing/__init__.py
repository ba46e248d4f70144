"""Packs many branches behind one shared prefix into one forward pass, and proves that it equals padded rows."""
