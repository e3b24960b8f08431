"""What interlace's layers are timed against: the same models written with other people's parallelism."""
