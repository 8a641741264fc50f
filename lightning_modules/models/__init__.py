"""Whole models (action expert, LaCT language models), and the mathematics of flow matching."""
