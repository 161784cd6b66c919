"""Decoding, from logits to answers: candidate spans, n-best lists, null odds, and the rules of other decoders.

Imports: qa.data, qa.features.
Start reading: exact.py; spans.py has the loss and the best spans of a row.
"""
