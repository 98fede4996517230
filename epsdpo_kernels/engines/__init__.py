"""The tile operations: one file an engine, and the parts of Triton's. They know tiles and tokens, no losses."""
