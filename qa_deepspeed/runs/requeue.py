"""How a preempted run reports that it must be resumed: an exit status, and a file for launchers that change it."""

REQUEUE_STATUS = 75
"""Exit status of a preempted run (EX_TEMPFAIL): the same command resumes it."""

REQUEUE_FILE = "requeue"
"""File in the output folder of a preempted run, since some launchers replace the exit status."""
