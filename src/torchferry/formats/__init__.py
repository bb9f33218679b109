"""What the bytes of checkpoints mean."""
