"""Where tests find the repository and the real data, which is not part of it."""

import os
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
SHARED = Path(os.environ.get("QA_DEEPSPEED_SHARED", REPOSITORY.parent / "shared"))
DATA = SHARED / "data"
MINILM = SHARED / "models" / "minilm-l6-uncased"

needs_real_data = pytest.mark.skipif(
    not DATA.is_dir(), reason=f"real data is not at {DATA} (set QA_DEEPSPEED_SHARED to the folder that holds it)"
)
needs_real_model = pytest.mark.skipif(
    not MINILM.is_dir(), reason=f"no real model at {MINILM} (set QA_DEEPSPEED_SHARED to the folder that holds it)"
)
