"""DeepSpeed: its configs, its engine and its checkpoints. Nothing outside this package imports it."""
