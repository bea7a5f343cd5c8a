"""What the command reads from and prints to a terminal: options, tables, progress, interrupts."""

# Its modules are imported by name, so that one does not import the others.
__all__: list[str] = []
