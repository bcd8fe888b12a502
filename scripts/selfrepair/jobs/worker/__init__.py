"""One warm process per device and model: a cell pays for its arithmetic, not for imports and loading."""
