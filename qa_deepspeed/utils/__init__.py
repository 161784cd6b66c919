"""What every folder may use: user errors, ranks and collectives, files written whole, progress bars.

Imports: nothing of this package.
Start reading: dist.py, the only file that names torch.distributed.
"""
