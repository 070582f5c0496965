"""Weights for piflux's demo: a small FLUX in `model`, and LPIPS in `lpips.safetensors`."""
