"""Several devices and processes: launchers, their set-up, and what is told when one is lost."""
