"""State on NVMe disks: the swap files of a run, and optimizer state in them that checkpoints save and load.

Imports: engine, models, utils.
Start reading: swap_files.py.
"""
