"""Generative pretraining on images in JAX: one GPT that learns by predicting image tokens."""

from gptv_jax.api import Model, load

__all__ = ["Model", "load"]
