"""Draws numpy arrays with matplotlib, for TensorBoard, reports and predictions."""

from aullm_dist.quiet import hide_matplotlib_cache

hide_matplotlib_cache()
