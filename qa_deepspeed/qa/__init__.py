"""Extractive question answering: reading, features, batches, decoding and scores. Knows nothing of DeepSpeed or ranks."""
