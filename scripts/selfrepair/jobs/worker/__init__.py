"""One warm process per device and model, which saves every cell after the first the imports and the loading."""
