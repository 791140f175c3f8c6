"""One operation per file: a jnp reference, the fast implementations, and the one function that picks."""
