"""What counts as a secret in a DeepSpeed config."""

from qa_deepspeed.engine.config_check import REDACTED, without_secrets


def test_secrets_are_replaced_and_the_rest_stays() -> None:
    config = {
        "comet": {"api_key": "a", "project": "p"},
        "wandb": [{"token": "b"}, {"hf_token": "c"}],
        "Password": "d",
        "max_tokens": "8",
        "tokenizer": "bert",
        "token": 5,
        "secret": "",
    }
    assert without_secrets(config) == {
        "comet": {"api_key": REDACTED, "project": "p"},
        "wandb": [{"token": REDACTED}, {"hf_token": REDACTED}],
        "Password": REDACTED,
        "max_tokens": "8",
        "tokenizer": "bert",
        "token": 5,
        "secret": "",
    }
    assert config["comet"] == {"api_key": "a", "project": "p"}
