"""Extractive question answering without ranks and without DeepSpeed: data, features, cache, decoding, metrics,
report.

Imports: utils.errors, utils.files.
Start reading: data/reading.py, features/build.py, decoding/exact.py.
"""
