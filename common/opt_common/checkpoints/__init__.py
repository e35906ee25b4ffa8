"""Checkpoints: opened, checked, read, written and converted, one tensor at a time."""
