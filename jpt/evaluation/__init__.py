"""Measuring models: perplexity, agreement with a teacher, multiple choice, exact answers."""
