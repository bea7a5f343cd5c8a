"""Commands whose work is done in the lab alone: convert, export, reproduce."""
