"""What to measure on a GPU so that the projection of all recipes gains most."""
