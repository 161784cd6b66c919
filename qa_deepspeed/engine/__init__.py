"""DeepSpeed: its configs, its engine, its checkpoints, and what a config costs in memory. The only folder that
imports deepspeed.

Imports: models, config, qa, utils.
Start reading: engine.py, then ds_config.py.
"""
