"""Training by gradient steps, shared by every stage that takes them."""
