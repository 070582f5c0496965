"""How ranks reach each other. Imports nothing of the runtime."""
