"""Scores: exact match and F1, null thresholds, confidence intervals, and the files that hold predictions.

Imports: qa.data, qa.features, qa.decoding.
Start reading: squad.py.
"""
