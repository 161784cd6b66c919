"""Commands that start a run or say what it would do: train, check, plan.

Imports: every stage; nothing outside cli imports it.
Start reading: train.py.
"""
