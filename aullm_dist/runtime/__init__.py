"""Handles the process of a run: signals, pre-emption, locks, exit codes, and its SLURM job."""
