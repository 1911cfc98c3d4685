"""The fastest legal layout that fits."""
