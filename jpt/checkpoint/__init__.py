"""Reading and writing weights and training state."""
