"""What a single GPU can tell of a cluster, as a list of measurements in the order of their value."""
