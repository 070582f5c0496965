"""The graph passes. Their order is `piflux.compiler.PASSES`; README.md has their invariants."""
