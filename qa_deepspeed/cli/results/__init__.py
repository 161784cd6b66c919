"""Commands that score and compare: evaluate, score, compare, ensemble.

Imports: every stage; nothing outside cli imports it.
Start reading: evaluate.py.
"""
