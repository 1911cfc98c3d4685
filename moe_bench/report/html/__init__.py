"""One self-contained page of results: cards of recipes, runs, published numbers, scaling and provenance."""
