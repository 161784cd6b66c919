"""Commands on files: audit, convert, prepare, and the quickstart's corpus.

Imports: every stage; nothing outside cli imports it.
Start reading: audit.py.
"""
