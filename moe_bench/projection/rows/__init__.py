"""Published rows as complete recipes, by stated rules, and what their engines do differently."""
