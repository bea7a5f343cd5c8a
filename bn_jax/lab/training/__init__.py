"""Parts of a training: its arms, what it records and draws, and how it is resumed."""

# Its modules are imported by name, so that one does not import the others.
__all__: list[str] = []
