"""What the command reads from and prints to a terminal: options, tables, progress, interrupts."""
