"""How a run that stopped with work left says so: an exit status, and a file for launchers that change statuses."""

REQUEUE_STATUS = 75
"""Exit status of a run that stopped with work left and is to be started again by the same command (EX_TEMPFAIL)."""

REQUEUE_FILE = "requeue"
"""Written into the output folder of such a run, since some launchers change exit statuses."""
