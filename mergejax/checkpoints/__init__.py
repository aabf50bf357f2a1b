"""Parameter trees on disk, one module per file format."""
