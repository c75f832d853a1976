"""The loop, its checkpoints, its cluster and its tracking."""
