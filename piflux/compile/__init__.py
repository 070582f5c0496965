"""From a captured graph to a callable that runs on one rank of many, and the report of it."""
