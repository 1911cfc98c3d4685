"""Step time, memory and scaling of a recipe before anyone pays for the cluster."""
