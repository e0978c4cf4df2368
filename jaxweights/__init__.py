"""Change the weights of trained models in JAX."""
