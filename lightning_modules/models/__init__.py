"""Whole models, and the mathematics of their training: flow matching and the action expert."""
