"""aullm-dist: distributed training of AULLM++ for action unit detection in micro-expression clips."""

__version__ = "0.1.0"

__all__ = ["__version__"]
