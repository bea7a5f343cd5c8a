"""Commands whose work is done in the lab alone: convert, export, reproduce."""

# Its modules are imported by name, so that one does not import the others.
__all__: list[str] = []
