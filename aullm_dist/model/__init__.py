"""AULLM++: visual backbone, evidence projector, AU graph, structured prompt and decoder."""
