"""Checks within seconds what would stop a run, on this machine and between the machines of a job."""
