"""Words and tools for graphs: axes, sizes, values, nodes, the plan, roles."""
