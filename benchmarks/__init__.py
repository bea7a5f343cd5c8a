"""The measurements whose figures the documentation shows; not part of the installed package."""
