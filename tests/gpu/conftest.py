"""The generated corpus and tiny models of the tests on several ranks."""

from tests.distributed.conftest import base_options, model_without_dropout, sample

__all__ = ["base_options", "model_without_dropout", "sample"]
