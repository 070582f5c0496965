"""Warm models behind an API. `jobs` has the words, that the front and the engine share."""
