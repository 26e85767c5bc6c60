"""The command line, `adaskip-fx`: a module for each command.

May import everything; nothing imports it. torch and transformers take seconds to import, so each
command imports what it needs when it runs, and the modules of commands import neither at the top.
"""
