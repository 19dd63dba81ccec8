"""Datasets, one file each, as they are distributed: files in, Study objects out."""
