"""Recipes: one module per task, each beside a run file (.yaml) of the same name."""
