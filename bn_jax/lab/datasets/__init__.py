"""What arrays, image files and iterables must be to be a dataset, and what looks odd in one."""

# Its modules are imported by name, so that one does not import the others.
__all__: list[str] = []
