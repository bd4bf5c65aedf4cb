"""Rematerialisation: which activations the forward pass keeps for the backward pass."""

import jax

# The name of activations that are costly to compute again: products with a weight, and the arrays
# that a fused attention kernel keeps for its gradient.
PRODUCT = "product"
POLICIES = {
    "dots": jax.checkpoint_policies.save_only_these_names(PRODUCT),
    "full": jax.checkpoint_policies.nothing_saveable,
}
