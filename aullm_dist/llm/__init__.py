"""Handles any decoder LLM: its files, loading, LoRA, NF4, and the packed step."""

from aullm_dist.quiet import hide_missing_cpu_kernel

# Here, because it must come before any module of this package imports PEFT.
hide_missing_cpu_kernel()
