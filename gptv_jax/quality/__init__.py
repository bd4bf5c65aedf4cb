"""How good generated images are, as a set beside real ones; docs/generation_quality.md.

It calls what a user calls (`api`) and nothing below knows it; stages may.
"""
