"""Files that hold runs: read without trust, written whole or not at all, sealed and locked."""

# Its modules are imported by name, so that one does not import the others.
__all__: list[str] = []
