"""What the scripts that train, build and audit are made of."""
