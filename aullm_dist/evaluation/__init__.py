"""Scores held-out subjects: metrics, floors, thresholds, confidence intervals and their tables."""
