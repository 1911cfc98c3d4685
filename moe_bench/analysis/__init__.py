"""Pure arithmetic on recipes: parameters, FLOPs and bytes, each formula with its equation and source."""
