"""AULLM++: visual backbone, evidence projector, AU graph, structured prompt and decoder."""

from aullm_dist.model.quiet import hide_missing_cpu_kernel

# Here, because it must come before any module of this package imports PEFT.
hide_missing_cpu_kernel()
