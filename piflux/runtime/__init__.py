"""What a compiled graph calls while it runs, and the state behind it."""
