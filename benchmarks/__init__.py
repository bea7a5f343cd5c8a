"""What the figures of the README come from; not part of the installed package."""
