"""What a graph can't see of the libraries that call it: seeds, call boundaries, progress bars."""
