"""Extractive question answering: reading, features, batches, decoding and scores. Knows no DeepSpeed and no ranks."""
