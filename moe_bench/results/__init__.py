"""What was measured and what others published: records, their store, and the registry of published rows."""
