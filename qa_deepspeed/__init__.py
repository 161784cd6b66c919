"""Fine-tuning readers for extractive question answering with DeepSpeed."""
