"""The ops, their definitions in PyTorch, and their shape functions."""
