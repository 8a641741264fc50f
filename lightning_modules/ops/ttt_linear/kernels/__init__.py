"""Triton kernels of TTT-Linear; importing a file of this folder imports triton."""
