"""What a run is asked to do: options, the run YAML, flags of older scripts, and the numbers derived from them.

Imports: qa, utils.
Start reading: run_options.py, then batch_plan.py.
"""
