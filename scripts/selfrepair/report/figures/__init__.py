"""The figures: each a module that turns tables into one `Figure`, and the few things they share."""
