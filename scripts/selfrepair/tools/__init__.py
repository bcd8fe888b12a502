"""What a user runs beside the workflow: commands such as estimate, verify and provenance, and the Python API.

Commands are started with `python -m selfrepair.tools.NAME` through a target of the Makefile. The package exports the
functions of the API.
Modules here may import from every room, and no room imports from here.
"""
