"""Decoders, one file per architecture."""
