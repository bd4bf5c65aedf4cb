"""Generative pretraining on images: one GPT that predicts image tokens."""

from gptv_jax.api import Model, from_huggingface, from_openai, load, load_tokenizer, to_huggingface

__all__ = ["Model", "from_huggingface", "from_openai", "load", "load_tokenizer", "to_huggingface"]
