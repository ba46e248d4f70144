"""Trains a model: folds, steps, the objective and the optimizer."""
