"""Files that are there whole or not at all, and locks on folders.

May import utils.text alone."""
