"""Starts the processes of a run and their engine: DDP, or DeepSpeed ZeRO through Accelerate."""
