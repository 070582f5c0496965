"""What a step costs: by arithmetic, and as measured."""
