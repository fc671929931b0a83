"""Images that ship with the program: one .npz a set, its licences beside it, and the script that makes it again.

May import nothing of this project, so that a script can run alone; never utils.data, whose modules read the files.
"""
