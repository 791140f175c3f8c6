"""Mathematics of the models, and nothing else."""
