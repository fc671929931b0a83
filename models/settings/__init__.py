"""Keys that several methods share, as pydantic classes that a method's Settings extend.

May import utils.config alone, so that --check and a misspelt key take a fraction of a second: no torch."""
