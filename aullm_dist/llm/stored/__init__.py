"""Reads and writes the files of a base: in pieces, the decoder of a larger model alone, or in NF4."""
