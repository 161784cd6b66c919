"""The evaluation report: slices, charts, the HTML page, sample predictions.

Imports: qa.data, qa.features, qa.decoding, qa.metrics.
Start reading: analysis.py, then page.py.
"""
