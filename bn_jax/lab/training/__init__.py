"""Parts of a training: its arms, what it records and draws, and how it is resumed."""
