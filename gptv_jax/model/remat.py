"""Rematerialisation: what the forward pass keeps, and the backward pass computes again."""

import jax

# The name of what is costly to compute: products of activations with a weight, and what a fused
# attention kernel keeps for its own gradient.
PRODUCT = "product"
POLICIES = {
    "dots": jax.checkpoint_policies.save_only_these_names(PRODUCT),
    "full": jax.checkpoint_policies.nothing_saveable,
}
