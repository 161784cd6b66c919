"""The command line: one file per sub-command, and the parser that finds them.

Imports: every other folder; nothing imports it.
Start reading: main.py, then train.py.
"""
