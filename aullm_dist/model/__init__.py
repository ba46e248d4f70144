"""Implements AULLM++, the model of the paper: visual backbone, evidence projector, AU graph, prompt and decoder."""
