"""What each flag of main.py does, one file a command, named as its flag.

May import everything below: models, backbone, utils. Only main.py imports it."""
