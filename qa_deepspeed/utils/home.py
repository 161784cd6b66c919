"""Where caches go: the user's cache folder, and a home folder for a process that has none."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def user_cache() -> Path:
    """The folder of the user's caches, by the rule of the XDG base directory specification."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")


def ensure_home() -> Path | None:
    """Set HOME, and USER, where neither the environment nor the accounts of this machine name a home folder.

    Containers run with such user ids; the Hugging Face libraries then write into a folder named "~", and torch's
    compiler fails.

    Returns:
        The new home, a folder of this user in the temporary folder, or None where a home was known.
    """
    try:
        Path.home()
    except RuntimeError:
        home = _private_folder()
        os.environ["HOME"] = str(home)
        os.environ.setdefault("USER", f"uid{os.getuid()}")  # getpass.getuser() finds no account
        return home
    return None


def _private_folder() -> Path:
    """The same folder for every process of this user; a new one where somebody else has taken its name."""
    folder = Path(tempfile.gettempdir()) / f"qa_deepspeed-home-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700)
    except FileExistsError:
        found = folder.lstat()
        if folder.is_symlink() or not folder.is_dir() or found.st_uid != os.getuid() or found.st_mode & 0o077:
            return Path(tempfile.mkdtemp(prefix="qa_deepspeed-home-"))
    return folder
