"""Files that are complete or absent, and locks on folders.

May import utils.text; never anything else of the project.
"""
