"""Passes that make a graph faster and leave what it computes."""
