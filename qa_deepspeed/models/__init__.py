"""What differs by architecture: how rows are laid out, and the heads that read them."""
