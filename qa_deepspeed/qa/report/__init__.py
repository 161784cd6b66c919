"""The evaluation report: one scoring pass, slices, charts, the HTML page, sample predictions.

Imports: qa.data, qa.features, qa.decoding, qa.metrics.
Start reading: result.py, then analysis.py and page.py.
"""
