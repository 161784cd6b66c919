"""Attention inside each row of a packed sequence, and the kernels for CPUs.

Imports: models, config, qa, utils.
Start reading: row_attention.py, then cpu_attention.py.
"""
