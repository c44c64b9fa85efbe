"""The commands: `main` reads the command line, each command has a file.

Imports all the rest; nothing imports it.
"""
