"""Folders, pipelines and their calls: what tools and servers draw with."""
