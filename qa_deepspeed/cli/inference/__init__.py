"""Commands that use a trained model: predict, export.

Imports: every stage; nothing outside cli imports it.
Start reading: predict.py.
"""
