"""The measurements whose figures the README shows; not part of the installed package."""
