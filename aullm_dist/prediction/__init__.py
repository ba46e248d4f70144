"""Answers clips with a trained model, as tables, JSON and pictures."""
