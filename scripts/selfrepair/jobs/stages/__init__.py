"""The stages of the workflow: one module each, with `run(job, session)`."""
