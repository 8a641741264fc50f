"""Triton kernels of chapter attention; importing a file of this folder imports triton."""
