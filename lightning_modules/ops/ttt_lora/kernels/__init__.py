"""Triton kernels of TTT-as-LoRA; imported when they are asked for, since triton is optional."""
