"""Commands that start runs or say what one would do: train, sweep, check, plan.

Imports: every stage; nothing outside cli imports it.
Start reading: train.py.
"""
