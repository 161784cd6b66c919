"""What a run reports while it trains: log lines, metrics.jsonl, TensorBoard, trackers, callbacks, a profile.

Imports: runs, engine, models, config, qa, utils.
Start reading: reporter.py.
"""
