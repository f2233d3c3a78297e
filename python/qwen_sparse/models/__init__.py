"""The decoder: its layers, their parts, and the matrix products that they are made of."""
