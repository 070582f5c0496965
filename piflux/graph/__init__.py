"""Words and tools for graphs: axes, sizes, values, nodes, roles."""
