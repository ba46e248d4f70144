"""The training room: the loop, its checkpoints, and what keeps a run alive on a cluster."""
