"""What arrays, image files and iterables must be to be a dataset, and what looks odd in one."""
