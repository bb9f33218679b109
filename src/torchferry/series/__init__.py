"""What :class:`~torchferry.CheckpointManager` is made of: how a series is stored, chosen from, kept and shared."""
