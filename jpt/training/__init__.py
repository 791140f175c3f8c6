"""Objective, optimizer, step and loop that every training job shares."""
