"""Scores that need a checkpoint or a package of their own."""
