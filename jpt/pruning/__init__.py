"""Making a smaller student from a model: what matters in it, by its activations, and what stays."""
