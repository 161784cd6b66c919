"""`python -m qa_deepspeed` is `qa-deepspeed`."""

from qa_deepspeed.cli.main import main

if __name__ == "__main__":
    main()
