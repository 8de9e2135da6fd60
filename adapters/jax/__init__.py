"""brainstate and JAX modules as torch modules: the seam between the two."""
