"""What differs by architecture: loading, QA heads, LoRA, attention kernels for CPUs, memory footprint.

Imports: config, qa, utils.
Start reading: loading.py, then heads.py.
"""
