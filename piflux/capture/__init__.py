"""Dynamo, and all that is done to it; the view that stands in for a module."""
