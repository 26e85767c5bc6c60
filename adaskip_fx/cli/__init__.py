"""The command line, `adaskip-fx`: a module for each command.

May import everything; nothing imports it.
"""
