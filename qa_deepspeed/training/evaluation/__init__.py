"""Evaluation: forward, gather, decoding, metrics, files.

Imports: training, runs, engine, models, config, qa, utils.
Start reading: evaluate.py.
"""
