"""How is a command configured?

Defaults, YAML, command line; files of the project's own, read back against their shape.
"""
