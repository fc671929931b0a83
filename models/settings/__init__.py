"""Keys that several methods share, as pydantic classes that a method's Settings extend.

May import utils.config and utils.text, so that a misspelt key is refused before torch is imported; never torch,
backbone or another package of models.
"""
