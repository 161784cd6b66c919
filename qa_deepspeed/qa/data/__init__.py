"""From files to validated examples, with a reason for every rejected row.

Imports: utils.errors, utils.files.
Start reading: reading.py, then validation.py.
"""
