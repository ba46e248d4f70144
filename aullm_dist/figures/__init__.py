"""Figures: numpy arrays drawn with matplotlib, for TensorBoard, reports and predictions."""
