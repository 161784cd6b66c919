"""From examples to features and micro-batches: tokenization, windows, labels, Arrow columns, collation.

Imports: qa.data, utils.
Start reading: build.py, then sampler.py and batching.py.
"""
