"""The graph passes, in the order of `piflux.compile.compiler`; README.md has their invariants."""
