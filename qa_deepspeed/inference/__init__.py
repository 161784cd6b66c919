"""Inference: answers from a trained model in Python, without DeepSpeed and without ranks.

Imports: models, config, qa, utils.
Start reading: answerer.py.
"""
