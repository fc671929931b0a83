"""The one vision transformer of all methods: timm's, with slots that adapters fill, its weights and its prefix cache.

May import utils.config, utils.data, utils.files, utils.process and utils.text; never the packages in this folder (they build on
these files), models or commands.
"""
