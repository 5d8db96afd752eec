"""Nearest neighbours: exact on CPU and GPU, or approximate."""
