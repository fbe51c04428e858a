"""Training: one loop, its objectives, optimizer, checkpoints."""
