"""The output folder of a run: its lock, fingerprint, record, reload check, model card, upload.

Imports: engine, models, config, qa, utils.
Start reading: folder.py, then identity.py.
"""
