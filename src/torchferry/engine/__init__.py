"""Moves bytes; knows no checkpoint, no cloud, no Flyte."""
