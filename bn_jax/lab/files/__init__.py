"""Files that hold runs: read without trust, written whole or not at all, sealed and locked."""
