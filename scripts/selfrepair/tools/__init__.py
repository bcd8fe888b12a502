"""Commands that a user runs beside the workflow: estimate, verify, provenance.

Each module is started with `python -m selfrepair.tools.NAME` through a target of the Makefile.
Modules here may import from every room, and no room imports from here.
"""
