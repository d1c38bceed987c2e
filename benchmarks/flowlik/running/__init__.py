"""Running: cells over processes, cores and machines, and the folder that takes their records."""
