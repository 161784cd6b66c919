"""Checkpoints: ZeRO shards, loop state, manifest; verification; state carried to another stage or number of ranks.

Imports: engine, models, config, qa, utils.
Start reading: checkpoint.py.
"""
