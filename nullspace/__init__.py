"""What the scripts of null-space DreamBooth are made of."""
