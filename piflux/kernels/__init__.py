"""The operations on keys, values and heads that have a kernel of their own."""
