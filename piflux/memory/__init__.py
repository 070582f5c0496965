"""What is remembered between steps: cache slots, their ages and places."""
