"""A recipe as work: what its layers ask of a GPU and its fabric, before anything has a price."""
