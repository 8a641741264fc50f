"""The Triton kernels of LaCT."""
