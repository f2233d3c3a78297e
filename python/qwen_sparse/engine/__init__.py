"""Prefill and generation, sampling, likelihoods, and the memory that they take."""
