"""Passes that split a graph over ranks."""
