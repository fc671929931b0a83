"""What each flag of main.py does, one file a command, named as its flag.

May import everything but main.py: models, backbone, utils; never main.py, which alone imports commands.
"""
