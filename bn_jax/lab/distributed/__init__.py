"""Several devices and processes: launchers, their set-up, and what is told when one is lost."""

# Its modules are imported by name, so that one does not import the others.
__all__: list[str] = []
