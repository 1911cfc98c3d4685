"""What was asked: frozen descriptions of models, systems, layouts and recipes, and their loader."""
