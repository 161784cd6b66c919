"""The shared feature cache: content key, entries of Arrow files, and the processes that build them together.

Imports: qa.data, qa.features.
Start reading: prepare.py, then key.py.
"""
