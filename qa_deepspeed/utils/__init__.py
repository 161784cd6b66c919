"""Used by every folder: user errors, ranks and collectives, atomic writes, progress bars, supported versions.

Imports: nothing of this package.
Start reading: dist.py, the only file that names torch.distributed.
"""
