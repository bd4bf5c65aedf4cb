"""Cached generation, and everything that draws or scores sequences of tokens."""
