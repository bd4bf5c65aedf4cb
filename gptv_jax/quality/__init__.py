"""How well a set of generated images matches a set of real ones; see docs/generation_quality.md.

This package calls `gptv_jax.api`, and only stages call this package.
"""
