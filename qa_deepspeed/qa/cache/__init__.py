"""The shared feature cache: content key, entries of Arrow files, and the processes that build them together.

Imports: qa.data, qa.features, utils.
Start reading: prepare.py, then key.py.
"""
