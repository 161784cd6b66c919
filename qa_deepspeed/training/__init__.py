"""A run from start to end: the training loop, evaluation, stopping, logging. Joins qa, models and engine.

Imports: runs, engine, inference (exported models), models, config, qa, utils.
Start reading: train.py, then loop.py.
"""
